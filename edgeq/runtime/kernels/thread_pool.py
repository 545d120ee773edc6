"""A fork-join thread pool in compiled code: how workers get a job without Python, and wait for it.

The caller fills in the job and posts it to every worker; each calls the job's function with
(address of the arguments, its own number). A worker that has finished spins for a while, looking
for the next job, before it sleeps: waking a sleeping thread takes longer than a small model needs
for a token, and while tokens are drawn one by one the next job comes soon.

No job is missed: a worker that goes to sleep clears ``awake`` first and then looks at ``posted``
once more, while the caller increments ``posted`` first and then reads ``awake``. All four are
sequentially consistent, so either the worker sees the job, or the caller sees the sleeper and
wakes it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeq.compiler.llvm_ir import I32, I64
from edgeq.runtime.kernels.abi import JOB, WORKER, offset
from edgeq.runtime.kernels.primitives import (
    atomic_add,
    atomic_load,
    atomic_store,
    compiled,
    cond_init,
    cond_signal,
    cond_wait,
    mutex_init,
    mutex_lock,
    mutex_unlock,
    pause,
    swap,
)
from edgeq.runtime.kernels.row_ops import nanoseconds, wait

_CHECKS = 64
"""Checks for a job between two looks at the clock."""
_FUNCTION, _ARGS, _LEFT, _FAILED = (
    offset(JOB, field) for field in ("function", "args", "left", "failed")
)
_POSTED, _AWAKE, _CLOCK, _RESULT, _MUTEX, _CONDITION = (
    offset(WORKER, field) for field in ("posted", "awake", "clock", "result", "mutex", "condition")
)
_WORKERS, _WORKER_BYTES = JOB.itemsize, WORKER.itemsize


@intrinsic
def _call(typingctx, function, result, args, tid):
    """Call a compiled function by address; returns its status, above 0 if it failed."""

    def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        # Numba's calling convention: two addresses for a result and an error, then the arguments
        function, result, *rest = values
        kind = ir.FunctionType(I32, [I64] * 4).as_pointer()
        second = builder.add(result, ir.Constant(I64, 8))
        return builder.call(builder.inttoptr(function, kind), [result, second, *rest])

    return types.int32(*[types.int64] * 4), codegen


@compiled
def _run_job(job, worker, tid):
    """A thread's part of the job; False if there is no job, which ends the pool."""
    function = atomic_load(job + _FUNCTION)
    if function == 0:
        return False
    if _call(function, worker + _RESULT, atomic_load(job + _ARGS), tid) > 0:
        atomic_store(job + _FAILED, 1)
    return True


@compiled
def _wait_for_job(worker, done, spin_ns):
    """Wait until more jobs are posted than done: spin for so many nanoseconds, then sleep."""
    start, checks = nanoseconds(worker + _CLOCK), 0
    while atomic_load(worker + _POSTED) == done:
        pause()
        checks += 1
        if checks % _CHECKS == 0 and nanoseconds(worker + _CLOCK) - start > spin_ns:
            break
    else:
        return
    mutex_lock(worker + _MUTEX)
    while True:
        swap(worker + _AWAKE, 0)
        if atomic_add(worker + _POSTED, 0) != done:
            break
        cond_wait(worker + _CONDITION, worker + _MUTEX)
    mutex_unlock(worker + _MUTEX)
    swap(worker + _AWAKE, 1)


def pool_init(job, threads):
    """Prepare the workers' records of a new pool."""
    for tid in range(threads):
        worker = job + _WORKERS + tid * _WORKER_BYTES
        atomic_store(worker + _AWAKE, 1)
        mutex_init(worker + _MUTEX, 0)
        cond_init(worker + _CONDITION, 0)


def pool_run(job, threads):
    """Post a job to ``threads`` - 1 workers, do the first part, wait for all; 1 if any failed."""
    atomic_store(job + _LEFT, threads - 1)
    for tid in range(1, threads):
        worker = job + _WORKERS + tid * _WORKER_BYTES
        atomic_add(worker + _POSTED, 1)
        if swap(worker + _AWAKE, 1) == 0:
            mutex_lock(worker + _MUTEX)
            cond_signal(worker + _CONDITION)
            mutex_unlock(worker + _MUTEX)
    _run_job(job, job + _WORKERS, 0)
    spins = 0
    while atomic_load(job + _LEFT) > 0:
        spins = wait(spins)
    return swap(job + _FAILED, 0)


def pool_worker(job, tid, spin_ns):
    """A worker thread: runs jobs as they are posted, until the pool ends."""
    worker = job + _WORKERS + tid * _WORKER_BYTES
    done = 0
    working = True
    while working:
        _wait_for_job(worker, done, spin_ns)
        done += 1
        working = _run_job(job, worker, tid)
        atomic_add(job + _LEFT, -1)


TYPES = {
    pool_init: types.void(types.int64, types.int64),
    pool_run: types.int64(types.int64, types.int64),
    pool_worker: types.void(types.int64, types.int64, types.int64),
}
"""What Python calls, by address (see `jit`)."""
