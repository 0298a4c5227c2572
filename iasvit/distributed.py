"""Several processes of one torch.distributed group, each with a device: who does what, and what they exchange.

All of them call the same functions in the same order. Where there is one process, or no group, each function here is
the plain computation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iasvit.errors import IasvitError

T = TypeVar("T")


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0; the first writes files and reports progress."""
    return dist.get_rank() if world_size() > 1 else 0


def processes_here() -> int:
    """How many of them are on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def own() -> slice:
    """This process's part of a sequence that the processes share: every world_size-th entry."""
    return slice(rank(), None, world_size())


def own_device(name: str) -> str:
    """The device of this process where the user asks for "cuda" or another kind of device: "cuda:1".

    Raises:
        IasvitError: there are more processes on this machine than GPUs, or one GPU is asked for by its number.
    """
    if world_size() == 1 or name.partition(":")[0] != "cuda":
        return name
    count, here = torch.cuda.device_count(), processes_here()
    if not count:
        return name  # of which torch says what is wrong
    if name != "cuda":
        raise IasvitError(f"--device {name} is one GPU, but there are {world_size()} processes; give cuda, or cpu")
    if here > count:
        raise IasvitError(
            f"there are {here} processes on this machine, but {count} GPUs; give torchrun --nproc-per-node {count}, or "
            "--device cpu"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK') or rank()}"


# ---- results ---------------------------------------------------------------------------------------------------------


def gathered(work: Callable[[], T]) -> list[T]:
    """What `work()` gives in each process, in order of rank; by pickle, so tensors should be in host memory.

    Raises:
        IasvitError: of the first process in which `work()` raised one; in all of them.
    """
    if world_size() == 1:
        return [work()]
    answer: tuple[Any, IasvitError | None]
    try:
        answer = work(), None
    except IasvitError as error:
        answer = None, error
    answers: list[Any] = [answer] * world_size()
    dist.all_gather_object(answers, answer)
    for _, raised in answers:
        if raised is not None:
            raise raised
    return [value for value, _ in answers]


def together(work: Callable[[], T]) -> T:
    """What `work()` gives here, once it is done everywhere; raises as `gathered` does."""
    results: list[T] = []
    gathered(lambda: results.append(work()))
    return results[0]


def first(work: Callable[[], T]) -> T:
    """What `work()` gives in the first process, which alone runs it; by pickle.

    Raises:
        IasvitError, OSError: as `work()` does, in all processes.
    """
    if world_size() == 1:
        return work()
    box: list[tuple[Any, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            box = [(work(), None)]
        except (IasvitError, OSError) as error:
            box = [(None, error)]
    dist.broadcast_object_list(box, src=0)
    value, raised = box[0]
    if raised is not None:
        raise raised
    return value


# ---- tensors ---------------------------------------------------------------------------------------------------------


def add_up(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the processes; all of them get the same bits."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def exchanged(work: Callable[[], Sequence[Tensor]], device: torch.device | None) -> list[Sequence[Tensor]]:
    """The tensors that `work()` gives in each process, in order of rank, all on this process's device.

    Raises:
        IasvitError: as `gathered` does.
    """
    mine: list[Tensor] = []

    def describe() -> list[tuple[torch.Size, torch.dtype]]:
        mine.extend(tensor.contiguous() for tensor in work())
        return [(tensor.shape, tensor.dtype) for tensor in mine]

    everything: list[Sequence[Tensor]] = []
    for source, known in enumerate(gathered(describe)):
        tensors = mine if source == rank() else [torch.empty(s, dtype=dtype, device=device) for s, dtype in known]
        for tensor in tensors if world_size() > 1 else ():
            dist.broadcast(tensor, source)
        everything.append(tensors)
    return everything


def divided(
    modules: Sequence[nn.Module], work: Callable[[list[int]], None], costs: Sequence[float] | None = None
) -> None:
    """Let each module be worked on in one process, and give all processes the state that it has then.

    Args:
        modules: in the same order everywhere.
        work: called with the numbers of the modules that this process works on.
        costs: what each is expected to take; None for all the same. The dearest are given away first.

    Raises:
        IasvitError: as `gathered` does.
    """
    owners = _owners(costs or [1.0] * len(modules))
    _worked(modules, owners, work)


def done_by_first(modules: Sequence[nn.Module], work: Callable[[], None]) -> None:
    """Let the first process work on these modules, and give all processes the states that they have then.

    Raises:
        IasvitError: as `gathered` does.
    """
    _worked(modules, [0] * len(modules), lambda numbers: work() if numbers else None)


def _owners(costs: Sequence[float]) -> list[int]:
    owners, loads = [0] * len(costs), [0.0] * world_size()
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


def _worked(modules: Sequence[nn.Module], owners: Sequence[int], work: Callable[[list[int]], None]) -> None:
    mine = [number for number, owner in enumerate(owners) if owner == rank()]

    def states() -> dict[int, dict[str, Tensor]]:
        work(mine)
        if world_size() == 1:
            return {}
        return {n: {k: v.cpu() for k, v in modules[n].state_dict().items()} for n in mine}

    for source, found in enumerate(gathered(states)):
        for number, state in found.items() if source != rank() else ():
            modules[number].load_state_dict(state)


def joined_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One float32 tensor of zeros for `add_up`, to whose parts backward adds the parameters' gradients."""
    sizes = [parameter.numel() for parameter in parameters]
    values = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, gradient in zip(parameters, values.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)
    return values


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_equal(what: str, *parts: object) -> None:
    """Find out whether the processes hold the same.

    Args:
        what: the parts are, for the message.
        parts: tensors, iterables of tensors, and other things, which are compared by their text.

    Raises:
        IasvitError: they do not; in all processes.
    """
    if world_size() == 1:
        return
    digests = gathered(lambda: digest(parts))
    if len(set(digests)) > 1:
        others = [str(number) for number, digest in enumerate(digests) if digest != digests[0]]
        raise IasvitError(
            f"{what} are not the same in process 0 and in process {', '.join(others)}; give all processes the same, "
            "on devices of one kind"
        )


def digest(parts: Iterable[object]) -> str:
    """Hex digits that tell whether two processes hold the same; see `check_equal`."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(f"{part.dtype} {tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        elif isinstance(part, Iterable) and not isinstance(part, str | dict):
            sha.update(digest(part).encode())
        else:
            sha.update(f"\x1f{part}".encode())
    return sha.hexdigest()
