"""Mapping of student blocks to teacher blocks. Blocks are numbered from 1."""

from collections.abc import Sequence

from ssmttm.errors import UserError

LAYER_MAPS = ("even", "first", "last", "ends")


def layer_map(kind: str | Sequence[int], n_student: int, n_teacher: int) -> list[int]:
    """The teacher block for each student block.

    Args:
        kind: "even" (every (n_teacher / n_student)-th block, so that the last blocks match), "first", "last", "ends"
            (half of each), or a list with one teacher block for each student block.
    """
    choices = f"choose one of {', '.join(LAYER_MAPS)}, or list the teacher blocks"
    if not isinstance(kind, str):
        is_list = isinstance(kind, Sequence) and all(type(block) is int for block in kind)
        if not is_list:
            raise UserError(f"invalid layer map {kind}: {choices}")
        blocks = list(kind)
    elif kind == "even":
        blocks = [-(-index * n_teacher // n_student) for index in range(1, n_student + 1)]
    elif kind not in LAYER_MAPS:
        raise UserError(f"unknown layer map {kind!r}: {choices}")
    elif n_student > n_teacher:
        raise UserError(f"the student has {n_student} blocks, more than its teacher's {n_teacher}: use layer map even")
    else:
        tail = {"first": 0, "last": n_student, "ends": n_student // 2}[kind]
        blocks = [*range(1, n_student - tail + 1), *range(n_teacher - tail + 1, n_teacher + 1)]
    if len(blocks) != n_student:
        raise UserError(f"the layer map lists {len(blocks)} blocks, the student has {n_student}: list one for each")
    invalid = [block for block in blocks if not 1 <= block <= n_teacher]
    if invalid:
        raise UserError(f"the teacher has no block {invalid[0]}: its blocks are 1 to {n_teacher}")
    return blocks
