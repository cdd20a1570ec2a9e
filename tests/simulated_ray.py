"""Ray's part in a fleet, simulated in one process."""

import pickle
from types import SimpleNamespace

from sst_interp.runs import fleet


class SimulatedRay:
    """What `Team` asks of Ray, in this process: `draw` decides who is ready first, and what becomes of it."""

    class exceptions:  # noqa: N801
        RayError = type("RayError", (Exception,), {})
        ActorDiedError = type("ActorDiedError", (RayError,), {})
        RayTaskError = type("RayTaskError", (RayError,), {"cause": None})

    roundtrip = False

    def __init__(self, draw):
        self.draw, self.started = draw, 0

    def remote(self, cls):
        def made(*args):
            self.started += 1
            return SimulatedActor(cls(*args))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=made))

    def wait(self, refs, num_returns=1, timeout=None):
        ready = refs if num_returns > 1 else [refs[self.draw(len(refs))]]
        return ready, []

    def get(self, ref):
        actor, name, args = ref
        fate = self.draw(4) if name == "do" else 3
        if fate == 0 or actor.dead:
            actor.dead = True
            raise self.exceptions.ActorDiedError("it died")
        if fate == 1:
            error = self.exceptions.RayTaskError()
            error.cause = ValueError("no luck")
            raise error
        if self.roundtrip and name == "start":
            args = pickle.loads(pickle.dumps(args))
        return getattr(actor.worker, name)(*args)

    def kill(self, actor):
        actor.dead = True

    def shutdown(self):
        pass


class SimulatedActor:
    def __init__(self, worker):
        self.worker, self.dead = worker, False

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *args: (self, name, args))


def simulated(monkeypatch, draw=lambda n: n - 1, workers=2):
    """Let every `Team` have such workers. Without a `draw` nobody fails."""
    ray = SimulatedRay(draw)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a worker sets its own
    monkeypatch.setattr(fleet, "_connected", lambda _: (ray, True, {}, workers))
    return ray
