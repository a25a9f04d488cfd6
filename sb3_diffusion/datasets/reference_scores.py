"""Reference scores and time limits of the D4RL tasks, for data that does not carry its own."""

from __future__ import annotations

import re
from typing import NamedTuple

# Where the scores of this module come from, for `OfflineDataset.score_label`.
D4RL_LABEL = "D4RL reference scores"
D4RL_REFERENCED_LABEL = "D4RL-referenced (data regenerated on another simulator version)"


class ReferenceScores(NamedTuple):
    """
    The two returns between which scores are normalised.

    :ivar ref_min_score: mean return of a random policy (0 %)
    :ivar ref_max_score: mean return of an expert (100 %)
    """

    ref_min_score: float
    ref_max_score: float


# First match counts. Source: d4rl/infos.py and d4rl/pointmaze/__init__.py of Farama-Foundation/D4RL.
_SCORES: tuple[tuple[str, ReferenceScores], ...] = (
    (r"hopper-", ReferenceScores(-20.272305, 3234.3)),
    (r"halfcheetah-", ReferenceScores(-280.178953, 12135.0)),
    (r"walker2d-", ReferenceScores(1.629008, 4592.3)),
    (r"ant-", ReferenceScores(-325.6, 3879.7)),
    (r"maze2d-open-dense-", ReferenceScores(11.17817, 27.166538620695782)),
    (r"maze2d-open-", ReferenceScores(0.01, 20.66)),
    (r"maze2d-umaze-dense-v0", ReferenceScores(23.249793, 81.78995240126592)),
    (r"maze2d-medium-dense-v0", ReferenceScores(19.47762, 96.03474232952358)),
    (r"maze2d-large-dense-v0", ReferenceScores(27.38831, 215.09965671563742)),
    (r"maze2d-umaze-v0", ReferenceScores(0.94, 62.6)),
    (r"maze2d-medium-v0", ReferenceScores(5.77, 85.14)),
    (r"maze2d-large-v0", ReferenceScores(4.83, 191.99)),
    (r"maze2d-umaze-dense-", ReferenceScores(68.537689, 193.66285642381482)),
    (r"maze2d-medium-dense-", ReferenceScores(44.264742, 297.4552547777125)),
    (r"maze2d-large-dense-", ReferenceScores(30.569041, 303.4857382709002)),
    (r"maze2d-umaze-", ReferenceScores(23.85, 161.86)),
    (r"maze2d-medium-", ReferenceScores(13.13, 277.39)),
    (r"maze2d-large-", ReferenceScores(6.7, 273.99)),
    (r"antmaze-", ReferenceScores(0.0, 1.0)),
    (r"pen-", ReferenceScores(96.262799, 3076.8331017826877)),
    (r"door-", ReferenceScores(-56.512833, 2880.5693087298737)),
    (r"hammer-", ReferenceScores(-274.856578, 12794.134825156867)),
    (r"relocate-", ReferenceScores(-6.425911, 4233.877797728884)),
    (r"kitchen-", ReferenceScores(0.0, 4.0)),
)

_HORIZONS: tuple[tuple[str, int], ...] = (
    (r"(hopper|halfcheetah|walker2d|ant)-", 1000),
    (r"maze2d-open-", 150),
    (r"maze2d-umaze-", 300),
    (r"maze2d-medium-", 600),
    (r"maze2d-large-", 800),
    (r"antmaze-umaze-", 700),
    (r"antmaze-", 1000),
    (r"pen-", 100),
    (r"(door|hammer|relocate)-", 200),
    (r"kitchen-", 280),
)

# Tasks that Gymnasium offers with the same observations: environment id, observation and action dimensions.
_GYMNASIUM_IDS: dict[str, tuple[str, int, int]] = {
    "hopper": ("Hopper-v5", 11, 3),
    "halfcheetah": ("HalfCheetah-v5", 17, 6),
    "walker2d": ("Walker2d-v5", 17, 6),
}


def d4rl_scores(name: str) -> ReferenceScores | None:
    """
    Look up the reference scores of a D4RL task.

    :param name: such as ``hopper-medium-v2``; underscores count as hyphens
    :return: None for a task without an entry
    """
    name = _normal_form(name)
    # no entry in D4RL's own table
    if name.startswith(("maze2d-eval", "ant-random-expert")):
        return None
    return next((scores for pattern, scores in _SCORES if re.match(pattern, name)), None)


def d4rl_horizon(name: str) -> int | None:
    """
    Look up the time limit of a D4RL task.

    :param name: such as ``maze2d-umaze-v1``; underscores count as hyphens
    :return: steps after which an episode is cut, None for an unknown task
    """
    return next((steps for pattern, steps in _HORIZONS if re.match(pattern, _normal_form(name))), None)


def d4rl_env_id(name: str, observation_dim: int, action_dim: int) -> str | None:
    """
    Find the Gymnasium environment of a D4RL task.

    :param name: such as ``hopper-medium-v2``; underscores count as hyphens
    :param observation_dim: of the data
    :param action_dim: of the data
    :return: None if there is none with these dimensions
    """
    env_id, *dimensions = _GYMNASIUM_IDS.get(_normal_form(name).split("-")[0], (None, 0, 0))
    return env_id if dimensions == [observation_dim, action_dim] else None


def minari_scores(dataset_id: str) -> ReferenceScores | None:
    """
    Look up reference scores for a public Minari dataset that carries none.

    :param dataset_id: such as ``mujoco/hopper/medium-v0`` or ``D4RL/pen/human-v2``
    :return: None for a dataset whose task is not in D4RL's table, or is there under another time limit
    """
    namespace, _, name = dataset_id.partition("/")
    name = _normal_form(name.replace("/", "-"))
    families = {"mujoco": ("hopper", "halfcheetah", "walker2d", "ant")}.get(
        namespace, ("antmaze", "pen", "door", "hammer", "relocate", "kitchen") if namespace == "D4RL" else ()
    )
    return d4rl_scores(name) if name.split("-")[0] in families else None


def _normal_form(name: str) -> str:
    """
    :param name: of a task or file
    :return: in lower case with hyphens
    """
    return f"{name.lower().replace('_', '-')}-"
