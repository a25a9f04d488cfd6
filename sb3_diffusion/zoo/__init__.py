"""
RL Zoo with the algorithms of this package: ``python -m sb3_diffusion.zoo train|enjoy``.

Importing it needs no RL Zoo; [register][sb3_diffusion.zoo.register] does.
"""


def register() -> None:
    """
    Make the algorithms known to RL Zoo: its ``train``, ``enjoy`` and hyperparameter search then take their names.

    Repeating it changes nothing. Programs of one's own on top of RL Zoo's ``ExperimentManager`` take
    ``sb3_diffusion.zoo.manager.DiffusionExperimentManager`` in its place.

    :raises ImportError: if RL Zoo is not installed; names the extra to install
    """
    try:
        import rl_zoo3.hyperparams_opt
        import rl_zoo3.train
    except ImportError as error:
        raise ImportError("The Zoo needs rl_zoo3 and optuna: pip install 'sb3-diffusion[zoo]'.") from error
    from sb3_diffusion import ALGORITHMS
    from sb3_diffusion.zoo.manager import DiffusionExperimentManager, make_sampler, to_arguments

    rl_zoo3.ALGOS.update(ALGORITHMS)  # the one dict that all its modules share
    for name in ALGORITHMS:
        rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER[name] = make_sampler(name)
        rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER[name] = to_arguments  # type: ignore[assignment]
    rl_zoo3.train.ExperimentManager = DiffusionExperimentManager  # type: ignore[misc]
