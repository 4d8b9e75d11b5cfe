"""A script of the shape of transformers' run_clm_no_trainer.py, on Accelerate.

    accelerate launch --num_processes 2 -m zerolite.examples.accelerate_no_trainer
    torchrun --nproc-per-node 2 -m zerolite.examples.accelerate_no_trainer

A line that ends in `# zerolite` is new; `# was:` is what stood there.
"""

import math

import torch
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator, get_scheduler

# was: from accelerate import Accelerator
from zerolite.integrations.accelerate import Accelerator  # zerolite


def examples(count: int) -> list[dict[str, list[int]]]:
    """Rows that count upwards, and a start of each that is no label."""
    rows = []
    for start in range(count):
        tokens, ignored = [(start + step) % 29 + 3 for step in range(12)], 1 + start % 4
        rows.append({"input_ids": tokens, "labels": [-100] * ignored + tokens[ignored:]})
    return rows


def main(stage: int = 3, output_dir: str = "outputs/no_trainer", resume_from: str | None = None):
    num_train_epochs, checkpointing_steps = 2, 2
    data = DataLoaderConfiguration(use_seedable_sampler=True)
    on_cpu = not torch.cuda.is_available()  # where Accelerate has to be told, to see other ranks
    options = {"gradient_accumulation_steps": 2, "dataloader_config": data, "cpu": on_cpu}
    # was: accelerator = Accelerator(**options)
    accelerator = Accelerator(**options, zero={"stage": stage, "offload": "cpu"})  # zerolite
    set_seed(42)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    train_dataloader = DataLoader(examples(48), shuffle=True, collate_fn=default_data_collator, batch_size=4)
    eval_dataloader = DataLoader(examples(8), collate_fn=default_data_collator, batch_size=4)
    no_decay = ["bias", "layer_norm.weight", "norm.weight"]
    grouped_parameters = [
        {
            "params": [p for n, p in model.named_parameters() if not any(nd in n for nd in no_decay)],
            "weight_decay": 0.1,
        },
        {
            "params": [p for n, p in model.named_parameters() if any(nd in n for nd in no_decay)],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(grouped_parameters, lr=1e-2)
    updates_per_epoch = math.ceil(len(train_dataloader) / accelerator.gradient_accumulation_steps)
    max_train_steps = num_train_epochs * updates_per_epoch
    lr_scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=max_train_steps)
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    completed_steps, logged = 0, []
    if resume_from is not None:
        accelerator.load_state(resume_from)
        completed_steps = int(resume_from.rpartition("_")[2])
    for epoch in range(num_train_epochs):
        model.train()
        steps_of_epoch = math.ceil(len(train_dataloader) / accelerator.gradient_accumulation_steps)
        if completed_steps >= (epoch + 1) * steps_of_epoch:
            continue
        train_dataloader.set_epoch(epoch)
        done = completed_steps - epoch * steps_of_epoch
        active = accelerator.skip_first_batches(train_dataloader, 2 * done) if done > 0 else train_dataloader
        for batch in active:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            logged.append(loss.item())
            if accelerator.sync_gradients:
                completed_steps += 1
                if completed_steps % checkpointing_steps == 0:
                    accelerator.save_state(f"{output_dir}/step_{completed_steps}")
        model.eval()
        losses = []
        for batch in eval_dataloader:
            with torch.no_grad():
                loss = model(**batch).loss
            losses.append(accelerator.gather_for_metrics(loss.repeat(4)))
        perplexity = math.exp(torch.cat(losses).mean())
        accelerator.print(f"epoch {epoch}: perplexity {perplexity:.3f}")
        logged.append(perplexity)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        output_dir,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    return logged, accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
