"""Where a run's numbers go beside its own logs: experiment trackers, by name.

    run:
      track: [wandb]                                    # and, or: trackio, swanlab
      track_options: {wandb: {project: digits, mode: online}}

Offline is the default, so no account is needed for anything. Keys of accounts are read by the
trackers' packages from where these keep them (`wandb login`, WANDB_API_KEY), never from a recipe.

To add one, write a module of this package with a function `start`, or one of your own, which a
recipe names "module:function":

    start(run, **options) -> tracker        `run` is a `TrackedRun`, the result a `Tracker`

What a tracker raises costs the run nothing but the tracker (`sfgrpo.run.tracking`).
"""

from sfgrpo.track.base import TrackedRun, Tracker

__all__ = ["TrackedRun", "Tracker"]
