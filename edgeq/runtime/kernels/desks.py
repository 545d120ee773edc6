"""How the threads of a team get their work without Python, and wait for more of it.

The caller fills in the job and posts it on every member's desk; each calls the job's function with
(address of the arguments, its own number). A member that has finished lingers, looking at its
desk, before it sleeps: to wake a sleeping thread takes longer than a small model needs for a
token, and while tokens are drawn one by one the next job comes soon.

A member that goes to sleep takes back D_AWAKE, then looks at its desk once more; who posts does
so first and takes D_AWAKE after. So either the member sees the job, or the caller sees the sleeper.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeq.runtime.kernels.ops import nanoseconds, wait
from edgeq.runtime.kernels.plan import (
    D_AWAKE,
    D_CLOCK,
    D_CONDITION,
    D_MUTEX,
    D_POSTED,
    D_ROOM,
    J_ARGS,
    J_DESK,
    J_DESKS,
    J_FAILED,
    J_FUNCTION,
    J_LEFT,
)
from edgeq.runtime.kernels.tile import I32, I64
from edgeq.runtime.kernels.vector import (
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

_LOOKS = 64
"""Looks at the desk between two at the clock."""


@intrinsic
def _call(typingctx, function, room, args, tid):  # type: ignore[no-untyped-def]
    """Call a compiled function by address; its status, above 0 if it failed."""

    def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        # Numba's calling convention: two addresses for a result and an error, then the arguments
        function, room, *rest = values
        kind = ir.FunctionType(I32, [I64] * 4).as_pointer()
        second = builder.add(room, ir.Constant(I64, 8))
        return builder.call(builder.inttoptr(function, kind), [room, second, *rest])

    return types.int32(*[types.int64] * 4), codegen


@compiled
def _do(job, desk, tid):  # type: ignore[no-untyped-def]
    """A thread's part of the job; False if there is none: the team is dismissed."""
    function = atomic_load(job + J_FUNCTION)
    if function == 0:
        return False
    if _call(function, desk + D_ROOM, atomic_load(job + J_ARGS), tid) > 0:
        atomic_store(job + J_FAILED, 1)
    return True


@compiled
def _look_out(desk, done, linger):  # type: ignore[no-untyped-def]
    """Wait until more jobs are posted than done: awake for so many nanoseconds, then asleep."""
    begun, looks = nanoseconds(desk + D_CLOCK), 0
    while atomic_load(desk + D_POSTED) == done:
        pause()
        looks += 1
        if looks % _LOOKS == 0 and nanoseconds(desk + D_CLOCK) - begun > linger:
            break
    else:
        return
    mutex_lock(desk + D_MUTEX)
    while True:
        swap(desk + D_AWAKE, 0)
        if atomic_add(desk + D_POSTED, 0) != done:
            break
        cond_wait(desk + D_CONDITION, desk + D_MUTEX)
    mutex_unlock(desk + D_MUTEX)
    swap(desk + D_AWAKE, 1)


def hire(job, threads):  # type: ignore[no-untyped-def]
    """Make the desks of a new team ready."""
    for tid in range(threads):
        desk = job + J_DESKS + tid * J_DESK
        atomic_store(desk + D_AWAKE, 1)
        mutex_init(desk + D_MUTEX, 0)
        cond_init(desk + D_CONDITION, 0)


def lead(job, threads):  # type: ignore[no-untyped-def]
    """Post a job to ``threads`` - 1 members, do the first part, wait for all; 1 if any failed."""
    atomic_store(job + J_LEFT, threads - 1)
    for tid in range(1, threads):
        desk = job + J_DESKS + tid * J_DESK
        atomic_add(desk + D_POSTED, 1)
        if swap(desk + D_AWAKE, 1) == 0:
            mutex_lock(desk + D_MUTEX)
            cond_signal(desk + D_CONDITION)
            mutex_unlock(desk + D_MUTEX)
    _do(job, job + J_DESKS, 0)
    spins = 0
    while atomic_load(job + J_LEFT) > 0:
        spins = wait(spins)
    return swap(job + J_FAILED, 0)


def serve(job, tid, linger):  # type: ignore[no-untyped-def]
    """What a member does all its life: jobs as they are posted, until it is dismissed."""
    desk = job + J_DESKS + tid * J_DESK
    done = 0
    working = True
    while working:
        _look_out(desk, done, linger)
        done += 1
        working = _do(job, desk, tid)
        atomic_add(job + J_LEFT, -1)


TYPES = {
    hire: types.void(types.int64, types.int64),
    lead: types.int64(types.int64, types.int64),
    serve: types.void(types.int64, types.int64, types.int64),
}
"""What Python calls, by address (see `native`)."""
