"""The only package that imports DeepSpeed: processes, the training engine, what is sharded.

    processes.py       start, rank, barrier, gather: the ranks and how they talk
    configuration.py   a recipe as DeepSpeed's configuration
    traffic.py         seconds spent on other ranks
    masters.py         the fp32 values the optimiser steps, this rank's share of them
    sharded.py         stage 3: parameters shared out, whole for a while, or layer by layer
    stored.py          DeepSpeed's files, read as data
    resharding.py      those of other ranks, or of another stage, shared anew
    training.py        the engine: accumulate, step, save, load

What DeepSpeed 0.19.8 does, found by comparing parameters with a plain PyTorch loop (two ranks and
one, LoRA and full weights; `python -m benchmarks.trainer.parity` repeats the part that we rely on):

Many backward passes per optimiser step
- `gradient_accumulation_steps` = micro-batches per step, then `engine(...)`, `engine.backward`,
  `engine.step` once per micro-batch: exact at stages 0, 1, 2, 3. `backward` divides by that number
  and gradients are averaged over ranks, so a sum with weight w per row wants
  w = micro-batches / local rows.
- The same with `set_gradient_accumulation_boundary(last)` before every backward: exact as well.
- N backward passes and one `step` with `gradient_accumulation_steps` = N: never steps, without a
  word (the counter moves in `step`).
- N backward passes and one `step` with `gradient_accumulation_steps` = 1: right at stages 0 and 3,
  but stages 1 and 2 keep the last micro-batch alone.
- Forwards without gradient between two micro-batches, or between a forward and its backward,
  change nothing at any stage, with adapters switched off or not; nor do frozen parameters.
- Gradient checkpointing (the non-reentrant kind, which diffusers uses) is exact at every stage.

Precision
- bf16 and fp16 at stage 0 are wrong: DeepSpeed's wrapper takes a step with zero gradients while it
  is built, so that Adam's bias corrections count one step too many (the first update is a quarter
  too small) and the weights decay once. Stages 1 to 3 are right, and only they can accumulate in
  fp32. So a recipe that asks for stage 0 in half precision gets stage 1.
- Gradients of half-precision networks accumulate in half precision unless told otherwise
  (`data_types.grad_accum_dtype`); we ask for fp32.
- A step whose gradient is not finite is skipped and `get_global_grad_norm` keeps its old value:
  `was_step_applied` tells. Stage 0 in fp32 checks nothing and knows no norm.
- CPUs without native fp16 are refused, though PyTorch computes it.
- A network is cast whole, also buffers and weights that diffusers keeps in fp32 (Wan's rotary
  tables, norms and time embedding); what is not trained of them we put back (`Precise`), frozen
  weights at stage 3 excepted, which are sharded by then.

Stage 3
- Every forward counts on all ranks running the same modules: a rank that has one batch less to
  sample makes the others wait for ever. `Engine.pace` evens the number of batches out.
- Each forward gathers every layer anew; `Engine.sampling` gathers once for a whole rollout.
- By default layers are let go only beyond a billion gathered parameters, so that a smaller network
  is whole on every rank while it trains; ours keep a quarter.
- Parameters of up to 100,000 elements stay whole by default, which is all of a small network;
  we keep vectors whole and shard matrices.
- `initialize` would turn a loaded network into a sharded one, but move it to the device whole
  before that, and have every rank but the first write over pages that all share with the file. So
  `shard` hands DeepSpeed's own conversion one parameter after the other, from rank 0, which alone
  reads them. Nothing is built inside `zero.Init`: reward models or judges cannot be sharded by
  accident.
- `initialize` replaces `torch.nn.functional.linear` for the whole process, and for good: its own
  lets gathered weights go between forward and backward, and adds the bias after rounding. In bf16
  numbers therefore differ from the other stages' by rounding, as do other networks' in the process.
- `safe_set_full_fp32_param` fails where ranks do not divide the number of elements.

Checkpoints
- Stage 0 keeps everything in one file, which any number of ranks loads. The others refuse another
  number ("Automatic adjustment of ZeRO's optimizer state partitioning ... not currently supported")
  short of converting the files to DeepSpeed's universal format. We read the shares as they are.
- bf16 at stage 1 has an optimiser of its own, with the same layout and without the loss scale.

- Buckets: stages 2 and 3 allocate `reduce_bucket_size` elements, 500 million unless told otherwise,
  for however small a network; ours is a sixteenth of what is trained.
"""

from sfgrpo.engine.processes import (
    LaunchError,
    barrier,
    context_group,
    exchange,
    gather,
    interface,
    largest,
    rank,
    start,
    stop,
    world,
)
from sfgrpo.engine.sharded import shard
from sfgrpo.engine.traffic import spent, synchronize
from sfgrpo.engine.training import Engine, frozen

__all__ = [
    "Engine",
    "LaunchError",
    "barrier",
    "context_group",
    "exchange",
    "frozen",
    "gather",
    "interface",
    "largest",
    "rank",
    "shard",
    "spent",
    "start",
    "stop",
    "synchronize",
    "world",
]
