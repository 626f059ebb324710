"""What a sensitivity sweep takes of memory and of the disk, from headers alone."""

from __future__ import annotations

from calibration.memory import available_bytes
from calibration.model.classes import text_config
from calibration.progress import Progress
from calibration.walk.head import PIECE_ELEMENTS
from ptq.fitting.sensitivity import Sweep
from ptq.planning.job import Job
from ptq.planning.peak import FACTOR, LIBRARIES, LOADED, WITH_TEXT

LOGITS = 8  # pieces of logits that exist at once: of the float model and a probe, and what gradients keep


def kept_bytes(job: Job, windows: int) -> int:
    """On disk: the hidden states of so many windows in front of every block."""
    return job.plan.spec.n_blocks * windows * job.seq_len * _token_bytes(job)


def sweeping_bytes(job: Job, sweep: Sweep) -> int:
    """At the fullest, above interpreter and libraries: on the way forward the states and a block, at the head what lies
    outside the blocks and logits, on the way back states and gradients, a block, and the sums over all windows with
    those of a lane and the graph of a window, or with what the price of a linear takes."""
    spec, reader, itemsize = job.plan.spec, job.reader, job.dtype.itemsize
    numel = {name: info.numel for name, info in reader.infos.items()}
    block = sum(n for name, n in numel.items() if name.startswith(spec.prefix(0)))
    outside = sum(n for name, n in numel.items() if spec.block_of(name) is None)
    shapes = {n.name[len(spec.prefix(0)) :]: n.shape for n in job.plan.layout.linears if n.block == 0}
    inputs = [shapes[s.linears[0]][1] for s in spec.block(0).inputs if s.linears[0] in shapes]
    states = sweep.windows * job.seq_len * _token_bytes(job)
    streams = (len(sweep.probes) + len(sweep.alone())) * min(sweep.probed, sweep.windows)
    streams *= job.seq_len * _token_bytes(job)
    weights = round(LOADED * block) + (itemsize * block if itemsize != 4 else 0)
    sums = 4 * (sum(n**2 for n in inputs) + sum(shape[1] ** 2 for shape in shapes.values()))
    graph = 2 * job.seq_len * sum(sum(shape) for shape in shapes.values()) * itemsize
    pricing = 4 * (FACTOR + 2) * max(inputs, default=0) ** 2
    logits = LOGITS * 4 * min(PIECE_ELEMENTS, job.seq_len * int(text_config(job.config).vocab_size))
    forward = weights + 4 * block + states + streams
    head = 2 * states + streams + itemsize * outside + logits
    lane = sums if sweep.windows > 1 else 0
    back = weights + 2 * states + sums + max(lane + graph, pricing)
    return max(forward, head, back) + LIBRARIES + WITH_TEXT


def tell_short(needed: int, progress: Progress) -> None:
    """A message where more memory is needed than is free now."""
    free = available_bytes()
    if free is not None and needed > free:
        progress.message(
            f"the sensitivities need about {needed / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free: "
            "fewer --samples or a shorter --seq-len take less"
        )


def _token_bytes(job: Job) -> int:
    return int(text_config(job.config).hidden_size) * job.dtype.itemsize
