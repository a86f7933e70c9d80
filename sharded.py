"""The tensors in a sharded run's checkpoint folders (folders.py), by torch.distributed.checkpoint: each process writes
and reads its own rows.

They can be read by any number of processes, or by one alone, as in last.pt. `.metadata` is read through an unpickler
that knows the package's classes for tensors alone, and tensors by torch.load's weights_only.
"""

import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from configurator import UserError, user_errors
from folders import checksum, checksums, complete
from fsdp import is_shared_out, own_part, with_tied
from processes import Processes
from run_dir import Background, RunDir

# the classes of torch.distributed.checkpoint that tell of tensors, and what their fields are made of
ADMITTED = {
    (metadata.__name__, name): getattr(metadata, name)
    for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
                 "_MEM_FORMAT_ENCODING")
} | {
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}  # fmt: skip


class Writer(dcp.FileSystemWriter):
    """Into one file a process, each on the disk before it counts as written."""

    def __init__(self, folder: Path):
        super().__init__(folder, single_file_per_rank=True, sync_files=True)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        """A disk's refusal as itself: torch's zip writer makes another error of it, whose cause does not travel."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            refusals = [e for e in (error.__cause__, error.__context__) if isinstance(e, OSError) and e.strerror]
            raise (refusals or [error])[0] from error

    def storage_meta(self) -> None:
        """Not the folder's name, which is a temporary one."""


class Reader(dcp.FileSystemReader):
    """Of tensors alone, from files in the folder itself; UserError for anything else in .metadata."""

    def read_metadata(self) -> metadata.Metadata:
        path = Path(self.path) / ".metadata"
        try:
            verified = checksums(path.parent)
            with open(path, "rb") as file:
                found = Unpickler(file).load()
            for info in found.storage_data.values():
                known = info.relative_path in verified and re.fullmatch(r"__\d+_\d+\.distcp", info.relative_path)
                if not known or info.transform_descriptors:
                    raise ValueError(f"it points at {info.relative_path!r}")
            for name, kind in found.state_dict_metadata.items():
                if type(name) is not str or type(kind) is not metadata.TensorStorageMetadata:
                    raise ValueError("it tells of more than tensors")
                stored = sum(chunk.sizes.numel() for chunk in kind.chunks)
                if stored != kind.size.numel() or min(kind.size, default=0) < 0:
                    raise ValueError(f"it does not tell where all of {name} is")
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise UserError(f"{path} is not what a sharded run writes, and no code in it is run: {error}") from error
        return found


class Unpickler(pickle._Unpickler):
    """Knows the classes in ADMITTED, and torch's dtypes, and changes none of them."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):
            raise pickle.UnpicklingError("it would change a class")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        found = ADMITTED.get((module, name)) or (getattr(torch, name, None) if module == "torch" else None)
        if (module, name) in ADMITTED or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def write_part(folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup) -> dict[str, list[int]]:
    """Writes the part of this process, one of the group, all of which have to call; the size and CRC-32 of its files.
    `tensors` are by names of their own: DTensors, of which each process has a part, or alike in every process.
    UserError where a disk refuses, in all of them."""
    try:
        dcp.save(tensors, storage_writer=Writer(folder), process_group=group)
        return {path.name: checksum(path) for path in folder.glob(f"__{dist.get_rank()}_*.distcp")}
    except dcp.api.CheckpointException as error:
        refusals = [e for e, _ in error.failures.values() if isinstance(e, OSError) and e.strerror]
        reasons = [str(e).splitlines() for e, _ in error.failures.values()]
        reason = refusals[0].strerror if refusals else reasons[0][0] if reasons and reasons[0] else "it failed"
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    raise UserError(f"a checkpoint in {folder.parent} could not be written ({reason})")


def read_tensors(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """`model` and `optimizers` as in last.pt, whole, on the CPU, of the folder whose state is `state`. UserError where
    they do not load."""
    kinds = Reader(folder).read_metadata().state_dict_metadata
    try:
        tensors = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in kinds.items()}
    except RuntimeError as error:
        raise UserError(f"{folder} does not load: {str(error).splitlines()[0]}") from error
    load_into(folder, tensors)
    weights = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    if "adapter" not in state:
        weights = with_tied(weights, state["model_args"])
    return {"model": weights, "optimizers": moments(tensors)}


def moments(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizers' state by parameter name, of tensors named 'optimizers/NAME/KEY'."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizers/"):
            _, parameter, key = name.split("/")
            found.setdefault(parameter, {})[key] = tensor
    return found


def read_shares(
    folder: Path, params: dict[str, torch.Tensor], group: dist.ProcessGroup
) -> dict[str, dict[str, torch.Tensor]]:
    """Reads each process's rows of the weights into `params`, in place; gives the optimizers' state of the same rows.
    Every process of the group has to call. UserError where the folder's tensors are not these."""
    tensors: dict[str, torch.Tensor] = {f"model/{name}": p.detach() for name, p in params.items()}
    for name, kind in Reader(folder).read_metadata().state_dict_metadata.items():
        if name.startswith("optimizers/"):
            p = params.get(name.split("/")[1])
            if p is not None and p.shape == kind.size:
                tensors[name] = torch.zeros_like(p, dtype=kind.properties.dtype)
            else:
                tensors[name] = torch.empty(kind.size, dtype=kind.properties.dtype)
    load_into(folder, tensors, group)
    return moments(tensors)


def load_into(folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Reads tensors by name, in place; with a `group` each of its processes its part. UserError where that fails."""
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that one process alone reads
            dcp.load(tensors, storage_reader=Reader(folder), process_group=group, no_dist=group is None)
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError, AssertionError, OSError) as error:
        failures = getattr(error, "failures", {})
        reason = str(next((e for e, _ in failures.values()), error)).strip().splitlines()
        raise UserError(f"{folder} does not load: {reason[0] if reason else type(error).__name__}") from error


class Saves:
    """Saves a sharded run while training goes on, each process its part. Every process has one, and all call it at the
    same time."""

    def __init__(self, processes: Processes, out_dir: str, files: RunDir | None, device: str):
        """`files` is the first process's; `device` is the one that this process trains on."""
        self.processes, self.files, self.device = processes, files, torch.device(device)
        self.background = files or Background(Path(out_dir))
        self.group = dist.new_group(backend="gloo")  # for a thread that is not the training's
        self.mesh = DeviceMesh.from_group(self.group, "cpu")

    @property
    def busy(self) -> bool:
        """Whether a save is under way in any of the processes."""
        return bool(self.processes.largest(int(self.background.busy)))

    def save(
        self, tensors: dict[str, torch.Tensor], state: dict[str, Any], ckpt: dict[str, Any] | None, wait: bool
    ) -> None:
        """Writes last-<iter_num>/ of `tensors`, by names of their own, and of `state`, which has none, after the save
        under way; and the first process `ckpt`, if there is any, as ckpt.pt. Returns once everything is copied to CPU
        memory, if there is room in every process; with `wait`, once it is on the disk. A disk that refuses is a
        warning, with `wait` a UserError, in the other processes SystemExit."""
        self.background.report(wait=True)
        # what the thread writes lies in CPU memory, if at all possible: it knows nothing of a GPU's streams
        own = self.background.copied({name: own_part(t) for name, t in tensors.items()}, self.processes.local_size)
        copied = not self.processes.largest(int(own is None))
        if copied:
            tensors = {name: self._as_before(own[name], t) for name, t in tensors.items()}
        elif self.device.type == "cuda":
            torch.cuda.synchronize()
        self.background.job = self.background.writer.submit(self._write, tensors, state, ckpt)
        if wait:
            self.finish()
        elif not copied:
            self.background.report(wait=True)

    def finish(self) -> None:
        """Waits for the save under way. UserError where the newest state is not on the disk, in the other processes
        SystemExit."""
        if not self.files:
            self.background.finish()
        self.processes.first(self.background.finish)

    def _as_before(self, copy: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in CPU memory as the same part of the same whole."""
        if not is_shared_out(tensor):
            return copy
        kind = {"shape": tensor.shape, "stride": tensor.stride()}
        return DTensor.from_local(copy, self.mesh, tensor.placements, run_check=False, **kind)

    def _write(self, tensors: dict[str, torch.Tensor], state: dict[str, Any], ckpt: dict[str, Any] | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # which each thread has to choose for itself
        name = f"last-{state['iter_num']}"
        temporary = self.background.folder / f"{name}.tmp"
        # ckpt.pt has no moments to go on from: it comes first only where there is a folder that has
        first = self.files and not self.files.has_folder

        def begin() -> None:
            self.files.log.sync()  # a state must not be ahead of the log: resuming writes no line that is before it
            self.files.save_best(None if first else ckpt)
            with user_errors(OSError, about=f"{self.files.folder} cannot be written to"):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()

        def end() -> None:
            with user_errors(OSError, about=f"{self.files.folder} cannot be written to"):
                complete(temporary, state, {name: told for _, part in parts for name, told in part.items()})
                self.files.take_folder(temporary, name, ckpt if first else None)

        problems = [self._problem(begin)]
        dist.broadcast_object_list(problems, group=self.group)
        part: dict[str, list[int]] = {}
        if not problems[0]:
            try:
                part = write_part(temporary, tensors, self.group)
            except UserError as error:
                problems = [str(error)]
            except Exception as error:  # whatever it is, the others wait for what this process has to tell
                problems = [f"a checkpoint could not be written ({type(error).__name__}: {error})"]
        parts = [("", part)] * self.processes.world_size
        dist.all_gather_object(parts, (problems[0], part), group=self.group)
        problem = next((problem for problem, _ in parts if problem), "") or self._problem(end)
        if problem and self.files:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(problem)

    def _problem(self, work: Callable[[], None]) -> str:
        """What stands in the way of work() in the first process; nothing in the others, which have none."""
        try:
            if self.files:
                work()
        except UserError as error:
            return str(error)
        except Exception as error:  # whatever it is, the others wait for what this process has to tell
            return f"a checkpoint could not be written ({type(error).__name__}: {error})"
        return ""
