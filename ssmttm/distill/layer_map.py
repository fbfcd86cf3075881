"""Which of a teacher's blocks a student's blocks answer to. Blocks are counted from 1."""

from collections.abc import Sequence

from ssmttm.errors import UserError

LAYER_MAPS = ("even", "first", "last", "ends")


def layer_map(kind: str | Sequence[int], n_student: int, n_teacher: int) -> list[int]:
    """The teacher's block for each of the student's.

    Args:
        kind: "even", every (n_teacher / n_student)-th, so that both ends meet; "first"; "last"; "ends", half of each;
            or the numbers themselves, one a block of the student.

    Raises:
        UserError: there is no such kind, the teacher has too few blocks for it, or a number is none or out of range.
    """
    if not isinstance(kind, str):
        if not isinstance(kind, Sequence) or not all(type(number) is int for number in kind):
            raise UserError(f"{kind} is no map of layers: choose from {', '.join(LAYER_MAPS)}, or list the blocks")
        numbers = list(kind)
    elif kind == "even":
        numbers = [-(-index * n_teacher // n_student) for index in range(1, n_student + 1)]
    elif kind not in LAYER_MAPS:
        raise UserError(f"unknown map of layers {kind!r}: choose from {', '.join(LAYER_MAPS)}, or list the blocks")
    elif n_student > n_teacher:
        raise UserError(f"a student of {n_student} blocks has more than its teacher's {n_teacher}: map its layers even")
    else:
        tail = {"first": 0, "last": n_student, "ends": n_student // 2}[kind]
        numbers = [*range(1, n_student - tail + 1), *range(n_teacher - tail + 1, n_teacher + 1)]
    if len(numbers) != n_student:
        raise UserError(f"{len(numbers)} blocks are named for a student of {n_student}: name one for each")
    wrong = [number for number in numbers if not 1 <= number <= n_teacher]
    if wrong:
        raise UserError(f"the teacher has no block {wrong[0]}: its blocks are 1 to {n_teacher}")
    return numbers
