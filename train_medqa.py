"""Fine-tune a causal language model on medical questions and answers, sharded over the ranks by zerolite.

    python train_medqa.py                                            one process
    torchrun --standalone --nproc-per-node 2 train_medqa.py          as many as there are GPUs or cores
    torchrun --nproc-per-node 2 train_medqa.py --config run.yaml --stage 3

Without options it trains a small LLaMA from scratch on the shipped corpus. `--help` lists the options. What a trained
model says is no medical advice.
"""

import math
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

import zerolite
from zerolite.medqa import (
    answers,
    auto,
    continuing,
    corpus,
    model,
    packing,
    processes,
    report,
    resume,
    room,
    template,
    trackers,
    tuning,
)
from zerolite.medqa.arguments import Options, parse
from zerolite.medqa.batches import Order, collate, fingerprint, micro_batches
from zerolite.medqa.best import Best
from zerolite.medqa.claim import begin, check_shared, claim_output, claimed
from zerolite.medqa.corpus import Corpus
from zerolite.medqa.divergence import Diverged, Divergence
from zerolite.medqa.ending import NotWritten, result_or_checkpoint
from zerolite.medqa.images import sight
from zerolite.medqa.loss import ALL, label_loss, validation_losses
from zerolite.medqa.processes import Processes, StopSignals
from zerolite.medqa.progress import Meter, Progress
from zerolite.medqa.streams import lasting


@dataclass
class Run:
    """Everything that training needs, checked and built."""

    options: Options
    processes: Processes
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    order: Order
    num_steps: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    position: resume.Position
    divergence: Divergence
    best: Best


def prepare(options: Options) -> Run:
    """Check and read everything that can be wrong, cheapest first, then build the model. Every rank must call it."""
    trackers.require(options.report_to)
    is_rank_0 = processes.environment_rank() == 0
    folder = Path(options.output_dir)
    unlocked = claim_output(options) if is_rank_0 else None
    found = continuing.find(options)
    tokenizer = model.load_tokenizer(options)
    chosen = template.choose(tokenizer, options.template)
    config = model.load_config(options, tokenizer)
    adapt = tuning.adaptation(options, tokenizer)
    # A run that goes on has the rows of the one before it, or is refused, and then changes nothing.
    data = corpus.load(options, tokenizer, folder / "rejected.jsonl" if is_rank_0 and not found else None)
    tuning.check_labels(data.train, template.template_of(tokenizer).end_token_id)
    model.check_ids([*data.train, *data.validation], tokenizer, config)
    data = packing.pack(data, options) if options.packing else data

    ranks = processes.join()
    check_shared(folder, ranks)
    options = options.resolved(ranks.device.type)
    options, why_so = auto.placed(options, config, adapt, ranks)
    data_print = fingerprint(data.train)
    if len({tuple(row) for row in ranks.gather(*map(ord, data_print))}) > 1:
        raise ValueError("the ranks read different training rows: every machine needs the same files and tokenizer")
    told = [options.told(ranks.device.type) + data.summary, continuing.changes(options), unlocked]
    ranks.print("\n".join(filter(None, [*told, chosen, data.first_row, why_so])))

    global_batch_rows = ranks.world_size * options.per_device_train_batch_size * options.gradient_accumulation_steps
    order = Order([len(example.input_ids) for example in data.train], global_batch_rows, options.seed)
    num_steps = options.max_steps or math.ceil(options.num_train_epochs * order.steps_per_epoch)
    ranks.print(room.check(options, config, adapt, ranks, num_steps))
    sharded = model.sharded(options, config, adapt)
    model.align_ends(sharded, tokenizer)
    if options.packing:
        packing.check(sharded)
    if options.image_folder is not None:
        sight.begin(sharded, tokenizer, options.stage)
    optimizer = model.optimizer_of(options, tuning.optimizer_groups(options, sharded))
    scheduler = model.scheduler_of(options, optimizer, num_steps)
    set_seed(options.seed + ranks.rank)  # each rank drops other activations
    position = resume.Position(0, options.seed, global_batch_rows, data_print, continuing.fixed_of(options))
    if found:
        continuing.go_on(sharded, found, optimizer, scheduler, position, num_steps, ranks.print)
    ranks.print(begin(options) if is_rank_0 else None)  # now that nothing refuses the run
    watched = Divergence(folder, options.precision), Best(options, folder, num_steps, ranks)
    return Run(
        options, ranks, folder, tokenizer, data, order, num_steps, sharded, optimizer, scheduler, position, *watched
    )


def train(run: Run) -> int:
    """Train, and leave the result in the output folder; the exit status. Every rank must call it."""
    run.processes.print(
        f"{tuning.trainable_table(run.model, run.options)}\n"
        f"{run.processes.world_size} x {run.processes.device.type}, "
        f"{run.num_steps} steps of {run.order.global_batch_rows} {'sequences' if run.options.packing else 'rows'}, "
        f"{run.order.steps_per_epoch} steps an epoch"
    )
    run.processes.print(report.placement_line(run.model, run.optimizer, run.options, run.processes))
    started_s, first_step = time.perf_counter(), run.position.step
    reported = trackers.Trackers(run.options, run.folder, run.model, run.processes)
    progress = Progress(run.folder, run.processes.rank, first_step, run.num_steps, reported)
    with claimed(run.folder), StopSignals() as signals, progress:
        run.best.resume(progress.records)
        if run.position.step < run.num_steps:  # else the end validates, and the step has one record
            validate(run, progress, signals)
        if first_step == 0:
            ask(run, signals)
        stopped_by = fit(run, signals, progress)
        if stopped_by is None:
            # A skipped step is none of the scheduler's, whose count a checkpoint keeps.
            run.divergence.check_result(run.position.step, run.scheduler.last_epoch, run.optimizer)
            run.processes.print(f"trained in {time.perf_counter() - started_s:.1f} s")
            conclude(run, progress)
            return 0
        folder = save_checkpoint(run)
        progress.close()
        again = processes.command("--resume", str(run.folder))
        run.processes.print(f"stopped by {stopped_by.name}: {folder} is complete; go on with: {again}")
        return 128 + stopped_by


def fit(run: Run, signals: StopSignals, progress: Progress) -> signal.Signals | None:
    """The optimizer steps; the signal that stopped them at a step boundary, or None when all, or enough, are done."""
    options, ranks, meter, first_step = run.options, run.processes, Meter(), run.position.step
    for step, rows in run.order.steps(first_step, run.num_steps):
        if run.best.is_exhausted:
            return None
        chosen = micro_batches(rows, ranks.rank, ranks.world_size, options.per_device_train_batch_size)
        examples = [[run.corpus.train[row] for row in micro_batch] for micro_batch in chosen]
        mine = [example for micro_batch in examples for example in micro_batch]
        num_labels, num_tokens, *stops = ranks.sum(
            sum(example.num_labels for example in mine),
            sum(len(example.input_ids) for example in mine),
            *signals.counts(),
        )
        if (stopped_by := signals.agreed(stops)) is not None:
            return stopped_by

        run.optimizer.zero_grad()  # here, not after the step, so that the memory table finds the last gradients
        for index, micro_batch in enumerate(examples):
            with zerolite.no_sync(run.model, enabled=index + 1 < len(examples)):
                loss = label_loss(run.model, collate(micro_batch, run.tokenizer.eos_token_id))
                # Gradients are averaged over ranks: world_size makes it the sum, over all label tokens of the step.
                (loss * (ranks.world_size / num_labels)).backward()
            meter.loss_sum += loss.detach()
        if options.is_adapter and step == first_step:
            zerolite.adapters.check_gradients(run.model)
        run.optimizer.step()
        if not run.optimizer.step_was_skipped:
            run.scheduler.step()
        run.position.step = step + 1
        run.divergence.add(step + 1, run.optimizer)
        meter.add(num_labels, num_tokens)

        progress.advance(step + 1)
        if (step + 1) % options.logging_steps == 0 or step + 1 == run.num_steps:
            log(run, progress, meter)
        with meter.paused():
            if options.eval_steps and (step + 1) % options.eval_steps == 0 and step + 1 < run.num_steps:
                validate(run, progress, signals)
                if options.model_name_or_path is not None:
                    ask(run, signals, each=1)
            is_best = options.load_best_model_at_end and run.best.step == step + 1
            if (step + 1) % options.save_steps == 0 or is_best:
                save_checkpoint(run)
    return None


def log(run: Run, progress: Progress, meter: Meter) -> None:
    loss_sum, host_memory_bytes = run.processes.sum(float(meter.loss_sum), progress.host_memory.resident_bytes())
    values = {
        "loss": loss_sum / meter.num_labels,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "grad_norm": run.optimizer.grad_norm,
        "tokens_per_second": meter.tokens_per_second,
        "peak_memory_bytes": run.processes.peak_memory_bytes(),
        "host_memory_bytes": int(host_memory_bytes),
        "num_skipped_steps": run.divergence.num_skipped,
    }
    meter.reset()
    progress.record(step=run.position.step, epoch=run.position.step / run.order.steps_per_epoch, **values)
    progress.show(run.position.step, values)


def validate(run: Run, progress: Progress, signals: StopSignals | None) -> None:
    """Measure and record the validation loss, unless one of `signals` comes: the loop then finds it at once."""
    batch_rows, pad_token_id = run.options.per_device_train_batch_size, run.tokenizer.eos_token_id
    groups, step = run.corpus.validation_by_language, run.position.step
    if not groups:
        return
    losses = validation_losses(run.model, groups, run.processes, batch_rows, pad_token_id, signals)
    if losses is not None:
        progress.record(step=step, **report.validation_record(losses))
        progress.print(f"step {step}: {report.validation_line(losses)}")
        run.divergence.check_loss(step, losses[ALL])
        run.best.add(step, losses[ALL])


def validate_end(run: Run, progress: Progress) -> None:
    """Once for the model of the last step, also where the run ended early, at an evaluation."""
    if run.position.step not in run.best.losses:
        validate(run, progress, signals=None)


def ask(run: Run, signals: StopSignals | None, each: int = 2) -> None:
    """Have `each` held-out questions of a language answered and kept, but of a model that has learned nothing yet."""
    is_trained = run.position.step > 0 or run.options.model_name_or_path is not None
    rows = answers.held_out_questions(run.corpus.validation_rows, each) if is_trained else []
    texts = answers.answer(run.model, run.tokenizer, rows, run.processes, run.options.cutoff_len, signals)
    if run.processes.rank == 0 and texts is not None:
        answers.keep(run.folder, run.position.step, rows, texts)


def save_checkpoint(run: Run) -> Path:
    folder = run.folder / f"checkpoint-{run.position.step}"
    resume.save(run.model, folder, run.optimizer, run.scheduler, run.position, frozen=not run.options.is_adapter)
    run.best.remove_oldest(folder)
    return folder


def conclude(run: Run, progress: Progress) -> None:
    """The result first, then what is told about it."""
    memory = report.memory_table(run.model, run.optimizer, run.options, run.processes)
    run.optimizer.zero_grad()
    last_step = run.position.step
    if run.options.load_best_model_at_end:
        validate_end(run, progress)
        run.position.step = run.best.load(run.model, last_step)
    if run.options.export:
        write = partial(tuning.write_result, run.options, run.model, run.tokenizer, run.folder, run.processes)
        save = partial(save_checkpoint, run)
        result = result_or_checkpoint(write, save, run.folder, run.position.step, run.processes)
    else:
        result = save_checkpoint(run)
    validate_end(run, progress)  # the result is safe: no signal needs an answer now
    progress.close()
    ask(run, signals=None)
    if run.processes.rank == 0:
        trainable, ended = tuning.trainable_table(run.model, run.options), run.best.told(last_step, run.position.step)
        about = progress.about(run.processes, last_step)
        run.processes.print(report.write(run.folder, run.options, about, trainable, ended, memory))
        run.processes.print(f"result: {result}; report: {run.folder / 'report.md'}, curves: {run.folder / 'loss.png'}")


@lasting()
def main() -> int:
    """The exit status: 0, 2 for a mistake of the user, 128 + n after signal n, 1 for any other failure."""
    rank = processes.environment_rank()
    processes.end_with_torchrun()
    try:
        try:
            run = prepare(parse(sys.argv[1:]))
        except (ValueError, OSError, zerolite.ZeroliteError) as error:
            return processes.refuse(error, rank)
        return train(run)
    except (Diverged, NotWritten) as error:
        return processes.refuse(error, rank, status=1)
    except KeyboardInterrupt:
        print("interrupted before the first step: nothing to save", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        return processes.report_failure(error, rank)


if __name__ == "__main__":
    processes.leave(main())
