"""The table of contents of a run: compose, plan, data, model, engine, train, evaluate, report.

    deepspeed train.py +exp=lora_cpu            also under python, torchrun, accelerate launch, srun: the same words
"""

import gc
import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from tunesmith.compose import COMPOSITION_ERRORS, drop_local_rank, explain, register_schema, typed
from tunesmith.config import Config, Refusal
from tunesmith.hardware import prepare_environment, this_machine
from tunesmith.peaks import measure_cpu
from tunesmith.plan import beside, describe, make_plan, run_id, shape_needs_files
from tunesmith.run import COMPLETED, FAILED, RunFolder, StopSignal, TrialFailed, failures, leave, refuse
from tunesmith.world import World, this_world

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let mistakes reach us: `explain` names all of them, a line each
register_schema()
sys.argv[1:] = drop_local_rank(sys.argv[1:])


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    world = this_world()
    hydra_says = HydraConfig.get()
    if hydra_says.mode is RunMode.MULTIRUN and world.size == 1:
        from launcher.sweep import run_in_child

        return run_in_child(typed(composed), hydra_says.overrides.task, this_machine())
    with failures(world) as failing:
        run(typed(composed), world, failing)
    return None


def run(config: Config, world: World, failing: list[RunFolder]) -> None:
    gc.disable()  # what importing makes lives on, and would be looked through again and again: 1 to 2 s of the start
    stop = StopSignal()
    machine = this_machine()
    base = None
    if shape_needs_files(config.model.path, config.model.known_as):
        from tunesmith.model.source import model_folder

        base = model_folder(config.model)
    folder = RunFolder.of(config, run_id(config), world)
    plan = make_plan(config, machine, world.size, local_size=world.local_size, model_folder=base, kept=folder.kept())
    if folder.say_if_complete():
        from tunesmith.metrics import hand_over_again

        hand_over_again(config, folder)
        return

    prepare_environment(on_cpu=plan.card == "cpu")
    # The plan holds; from here on torch is imported, and files are fetched and prepared, before process groups exist.
    from tunesmith import checkpoint, data, doctor, engine, evaluate, loop, metrics, model, report

    gc.freeze()  # nor need it be looked through later
    gc.enable()
    data.prepare_files(config)
    base = base or model.model_folder(config.model)
    dataset = data.load(config, model.load_tokenizer(base))
    if plan.card == "cpu":
        measure_cpu(config.hardware.peak, machine, plan.config.precision.multiplied, plan.threads)
    plan = make_plan(
        config, machine, world.size, dataset.counts(config), local_size=world.local_size, model_folder=base,
        micro_limit=folder.restarts.micro_batch, kept=folder.kept(),
    )  # fmt: skip
    folder.open(config, plan, dataset.fingerprint)
    config = plan.config  # with what the plan has chosen
    failing.append(folder)
    known = [*doctor.explain(config, machine), *loop.data_notes(config, plan, dataset), *folder.restarts.lines()]
    folder.say("\n".join([describe(plan), *known]))

    device = engine.device_for(world, config)
    threads = config.hardware.threads or max(1, machine.cores // world.local_size)
    engine.join(config, world, device, threads, folder.restarts.count)
    model.without_bitsandbytes(config)
    worker = engine.build_engine(config, plan, world, model.build_model(config, base, device), device)
    if dataset.beginning:
        worker.read_beginning(dataset.beginning, dataset.invocation)
    saves = checkpoint.Checkpoints(folder.checkpoints, worker, config.train.keep)
    done = saves.restore()
    if done == 0 and (line := loop.check_range(config, plan, worker, dataset)):
        folder.say(line)
    states = loop.frozen_states(config, plan, worker, dataset, folder, base) if done < plan.steps else None

    def judge() -> dict[str, object]:
        return evaluate.evaluate(worker, dataset, config.eval, plan.micro_batch)

    before = folder.evaluation("before", judge, wanted=config.eval.before and done == 0)
    with metrics.open_sinks(config, folder, plan.steps, done) as sinks:
        steps, ended = loop.train(loop.Training.of(config, plan, worker, dataset, machine, sinks, saves, stop, states), done)
        checkpoint.export(worker, folder.result_for(config))
        after = folder.evaluation("after", judge, wanted=config.eval.after)
        rows = metrics.read_metrics(folder.path / "metrics.jsonl")
        sinks.summarise({**after, **metrics.totals(rows, world.size, config.hardware.price_per_h), "run/ended": ended})
    folder.say(beside(plan, rows))
    folder.complete(steps, ended, evaluate.side_by_side(dataset, before, after, config.eval.samples))
    if world.is_main:
        report.write_report(folder.path)
    folder.say_what_was_made()
    worker.close()


if __name__ == "__main__":
    try:
        main()
        leave(COMPLETED)
    except TrialFailed as failed:
        if failed.said_by != os.getpid():
            print(f"tunesmith: {failed}", file=sys.stderr)
        leave(FAILED)
    except COMPOSITION_ERRORS as error:
        refuse(Refusal(explain(error, sys.argv[1:])))
    except Refusal as refusal:  # variables of a launcher that contradict each other: `failures` needs to know the rank
        refuse(refusal)
