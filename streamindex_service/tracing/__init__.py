"""Spans by OpenTelemetry, an optional extra. Imported only when the settings name a collector."""
