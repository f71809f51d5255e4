"""acclimate itself. The model is imported from torch ahead of time; the measured process has numpy alone."""

from __future__ import annotations

import pickle
from pathlib import Path

import worker


def graph_file(job: worker.Job) -> Path:
    return Path(job.folder) / "acclimate.graph"


def prepare(job: worker.Job) -> None:
    import torch
    from with_torch import module

    import acclimate

    x, _, _, _ = job.arrays()
    graph = acclimate.from_torch(module(job), torch.zeros(1, *x.shape[1:]))
    graph_file(job).write_bytes(pickle.dumps(graph))


def build(job: worker.Job) -> worker.Step:
    import acclimate

    x, y, _, _ = job.arrays()
    plan = acclimate.plan(
        pickle.loads(graph_file(job).read_bytes()),
        scheme=dict.fromkeys(job.learn),
        loss=job.loss,
        optimizer={"sgd": acclimate.SGD(lr=job.lr), "adamw": acclimate.AdamW(lr=job.lr)}[job.optimizer],
        batch_size=job.batch,
        threads=job.threads,
    )
    learner = acclimate.Learner(plan)
    job.facts = {
        "macs_per_step": plan.macs_per_step,
        "arena_bytes": plan.arena_bytes,
        "peak_bytes": plan.peak_bytes,
    }

    def step() -> float:
        learner.partial_fit(x, y)
        return learner.loss_history[-1]

    return step


if __name__ == "__main__":
    worker.main(build, prepare)
