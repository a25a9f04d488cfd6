"""
DTQL in several processes, each with its share of every batch, on CPU cores or on GPUs.

    torchrun --nproc-per-node 2 examples/several_processes.py --steps 2000

Without torchrun it is one process with the whole batch, which makes the same steps.
"""

import argparse
import os

import torch as th
from torch import distributed as dist

from sb3_diffusion import DTQL, load_dataset, make_env
from sb3_diffusion.common.distributed import n_processes, process_rank
from sb3_diffusion.datasets import DEFAULT_DATASET_ID
from sb3_diffusion.evaluation import evaluate


def main() -> None:
    """Train together, and let the first process evaluate and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=DEFAULT_DATASET_ID, help="any Minari id; the default is recorded on first use")
    parser.add_argument("--steps", type=int, default=2_000, help="gradient steps, of all processes together")
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    parser.add_argument("--episodes", type=int, default=5, help="of the evaluation")
    parser.add_argument("--out", default="together", help="file of the model")
    options = parser.parse_args()

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local_rank}" if th.cuda.device_count() > local_rank else "cpu"
    if "RANK" in os.environ:  # what torchrun sets
        dist.init_process_group("nccl" if device != "cpu" else "gloo")
    if process_rank() == 0:
        load_dataset(options.dataset)  # one alone records what is not there yet
    if n_processes() > 1:
        dist.barrier()

    model = DTQL("MlpPolicy", None, dataset=options.dataset, batch_size=options.batch_size, seed=0, device=device)
    model.learn(options.steps, progress_bar=True)
    if process_rank() == 0:  # all of them are the same now
        model.save(options.out)
        result = evaluate(model, make_env(options.dataset), options.episodes, seed=0)
        print(f"{n_processes()} process(es), {options.steps} steps: mean return {result.returns.mean():.1f}")
    if n_processes() > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
