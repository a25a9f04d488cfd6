"""
Sweeps: algorithms x datasets x seeds x hyperparameters, one trial for each, on Ray Tune; on this machine or on a cluster.

A trial is one run of ``learn``. At equal distances it is evaluated and saved by ``model.save``; from that file it goes on, bit
for bit offline, when its process or the whole sweep was killed.
"""

from sb3_diffusion.sweep.command import sweep
from sb3_diffusion.sweep.results import SweepResults
from sb3_diffusion.sweep.running import resume_sweep, run_sweep
from sb3_diffusion.sweep.settings import SweepSettings

__all__ = ["SweepResults", "SweepSettings", "resume_sweep", "run_sweep", "sweep"]
