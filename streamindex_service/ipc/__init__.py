"""Between the frontend and its workers: memory segments, a link of packets, a supervisor."""
