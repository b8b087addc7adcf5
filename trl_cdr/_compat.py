"""What the installed TRL has. The only place that asks for its version; imports it only inside the functions."""

from importlib.metadata import version

from packaging.version import Version


def register_pairwise_judge(judge: type) -> None:
    """
    Make a class a subclass of TRL's `BasePairwiseJudge` in the eyes of `isinstance`. Without effect where TRL has no
    judges.

    Args:
        judge (`type`): Has the method `judge` of TRL's protocol.
    """
    # TRL 1.1 removed judges (trl#5485), and looking for them there would load trl.experimental; drop with the floor.
    if Version(version("trl")).release >= (1, 1):
        return
    from trl.experimental.judges import BasePairwiseJudge

    BasePairwiseJudge.register(judge)
