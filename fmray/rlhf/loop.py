"""PPO, from a configuration to a policy that was taught. Read it top to bottom: act, judge, credit, learn, refresh."""

from __future__ import annotations

from fmray.config.rlhf import RlhfConfig
from fmray.rlhf.held_out import evaluate
from fmray.rlhf.learner import make_learner
from fmray.rlhf.ppo import give_credit, learn
from fmray.rlhf.publishing import publish
from fmray.rlhf.stopwatch import Stopwatch, sample_rows
from fmray.runtime.context import Context, Outcome
from fmray.training.checkpoint import Checkpoints
from fmray.training.schedule import due


def train_ppo(config: RlhfConfig, context: Context) -> Outcome:
    """Schulman et al. 2017 with the habits of Huang et al. 2024; the same code in one process and on every rank of many."""
    # ------------------------------------------------------------------------------ 1. who learns, where it left off
    learner = make_learner(config, context)
    checkpoints = Checkpoints(context, config.train.keep_checkpoints)
    first, last = checkpoints.resume(learner), config.train.iterations
    policy, engine, crew = learner.model.policy, learner.engine, learner.crew
    publish(policy, engine, first, config, context)
    if first == 0 and config.train.evaluate_prompts:
        context.report(0, evaluate(learner, 0, context))

    # ------------------------------------------------------------ 2. the iterations; a version is so many iterations learned
    for iteration in range(first, last):
        watch = Stopwatch()
        crew.ask_ahead(iteration, version=iteration, last=last - 1)
        asked = crew.act(iteration)
        watch.lap("act")
        judged = crew.judge(asked)
        judgement = learner.bank.combine(judged.raw, judged.rollouts, judged.failures)
        watch.lap("judge")
        batch, measured = give_credit(judged, judgement, learner, iteration, context)
        watch.lap("credit")
        measured |= judgement.metrics | learn(batch, learner, iteration, context)
        watch.lap("learn")
        publish(policy, engine, iteration + 1, config, context)
        watch.lap("refresh")

        done, finished = iteration + 1, iteration + 1 == last
        context.report(done, measured | watch.metrics(batch.rollouts))
        if due(done, config.train.samples_every) or finished:
            context.show_samples(done, sample_rows(judged, judgement, config.train.samples))
        stopping = context.stop_requested() and not finished
        evaluating = finished or (due(done, config.train.evaluate_every) and not stopping)
        if evaluating and config.train.evaluate_prompts:
            context.report(done, evaluate(learner, done, context))
        if finished or stopping or due(done, config.train.checkpoint_every):
            checkpoints.save(done, learner, learner.export())
        if stopping:
            return Outcome(steps=done, finished=False)
    return Outcome(steps=last, finished=True)
