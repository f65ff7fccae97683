"""Ways to break the core that several tests use."""

from __future__ import annotations

from streamindex_service.core.band_queue import BandQueue


def nobody_is_too_far_behind(patch):
    """A turn that is held back waits until others make room, however far its caller has fallen behind."""
    choices = BandQueue._choices

    def patient(self, caller, admission):
        return [(turn, 1e9 * behind_s) for turn, behind_s in choices(self, caller, admission)]

    patch.setattr(BandQueue, "_choices", patient)
