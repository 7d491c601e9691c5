#!/usr/bin/env bash
# Every stage on the small real model, one after the other, and a report of what each of them did.
#
#   bash run_pipeline.sh                              sets itself up; made for 2 CPU cores; it takes any GPUs
#   MODEL=Qwen/Qwen3-0.6B bash run_pipeline.sh        another model
#   OUTPUTS=elsewhere bash run_pipeline.sh            another folder than outputs; what an earlier run left there is replaced
#
#   pretraining ─ merge ─ finetuning ─ merge ─┬─ reward model ─ merge ─┐
#                                             ├─ PPO, scored by it ────┴─ merge
#                                             └─ DPO ─ merge
#
# Each stage is evaluated before and after it trains, on records that it does not train on. The report is printed and
# written to outputs/report.md. Exit code 0 only if every stage learned what it should.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# ── settings: small enough for two cores ─────────────────────────────────────────────────────────────────────────────
# They follow each recipe's own flags and count in their place. A GPU takes them as they are.
EVERY=(--eval_on_start --save_eval_records --eval_strategy no --save_strategy no --overwrite_output_dir --logging_steps 2)
PT=(--block_size 512 --per_device_train_batch_size 1 --max_steps 16 --learning_rate 1e-3)
SFT=(--model_max_length 512 --per_device_train_batch_size 1 --max_steps 36 --learning_rate 1e-3)
RM=(--max_source_length 512 --max_target_length 256 --per_device_train_batch_size 4 --max_steps 24 --learning_rate 5e-4)
RM+=(--train_sampling_strategy group_by_length)
PPO=(--max_source_length 512 --max_target_length 48 --temperature 0.7 --batch_size 16 --mini_batch_size 8 --ppo_epochs 2)
PPO+=(--rollouts 8 --learning_rate 5e-4 --init_kl_coef 0.05 --lam 1.0)
DPO=(--max_source_length 512 --max_target_length 256 --per_device_train_batch_size 4 --max_steps 14 --learning_rate 5e-4)
DPO+=(--train_sampling_strategy group_by_length)

# ── set up ───────────────────────────────────────────────────────────────────────────────────────────────────────────
set_up
find_devices
choose_model # MODEL, else the small model, which is fetched
BASE=$MODEL
export PYTHON GPUS NPROC OUTPUTS
mkdir -p "$OUTPUTS"
printf 'started\t%s\n' "$(date +%s)" >"$OUTPUTS/seconds.tsv"

# stage NAME FLAGS…: runs run_NAME.sh from MODEL, merges its adapter into MODEL, and writes down the seconds of both.
stage() {
    local name=$1 began=$SECONDS
    shift
    say "" && say "━━ $name ━━"
    MODEL=$MODEL bash "run_$name.sh" "${EVERY[@]}" "$@"
    run "$PYTHON" merge_peft_adapter.py --base_model "$MODEL" --lora_model "$OUTPUTS/$name" \
        --tokenizer_path "$OUTPUTS/$name" --output_dir "$OUTPUTS/$name-merged" --overwrite_output_dir
    printf '%s\t%s\n' "$name" $((SECONDS - began)) >>"$OUTPUTS/seconds.tsv"
}

# ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────
MODEL=$BASE stage pt "${PT[@]}"
MODEL=$OUTPUTS/pt-merged stage sft "${SFT[@]}"
MODEL=$OUTPUTS/sft-merged stage rm "${RM[@]}"
MODEL=$OUTPUTS/sft-merged REWARD_MODEL=$OUTPUTS/rm-merged stage ppo "${PPO[@]}"
MODEL=$OUTPUTS/sft-merged stage dpo "${DPO[@]}"

# ── report ───────────────────────────────────────────────────────────────────────────────────────────────────────────
say "" && say "━━ report ━━"
run "$PYTHON" -m tools.report --outputs "$OUTPUTS"
