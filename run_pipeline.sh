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
# They follow each recipe's own flags and count in their place. A GPU takes them as they are. The recipes evaluate five
# times; here an evaluation costs as much as a third of a stage's training, and the report needs the first and the last.
# PT and SFT, whose evaluations are the cheapest, make two more: about 4% of the whole.
EVERY=(--eval_on_start --save_eval_records --eval_strategy no --save_strategy no --overwrite_output_dir --logging_steps 2)
EVERY+=(--eval_samples 0) # the report asks the models three questions
PT=(--block_size 512 --per_device_train_batch_size 1 --max_steps 16 --learning_rate 1e-3)
PT+=(--eval_strategy steps --eval_steps 0.34)
SFT=(--model_max_length 512 --per_device_train_batch_size 1 --max_steps 36 --learning_rate 1e-3)
SFT+=(--eval_strategy steps --eval_steps 0.34)
RM=(--max_source_length 512 --max_target_length 256 --per_device_train_batch_size 4 --max_steps 24 --learning_rate 5e-4)
RM+=(--train_sampling_strategy group_by_length)
# Of this model's Chinese, which it hardly speaks, the reward model's scores are noise.
PPO=(--train_file_dir data/finetune/train/english.jsonl)
PPO+=(--max_source_length 128 --max_target_length 48 --temperature 0.7 --batch_size 32 --mini_batch_size 16 --ppo_epochs 2)
PPO+=(--rollouts 8 --learning_rate 5e-4 --init_kl_coef 0.08 --lam 1.0 --eval_answers 2 --per_device_eval_batch_size 26)
DPO=(--max_source_length 512 --max_target_length 256 --per_device_train_batch_size 4 --max_steps 14 --learning_rate 5e-4)
DPO+=(--train_sampling_strategy group_by_length)

# ── set up ───────────────────────────────────────────────────────────────────────────────────────────────────────────
set_up
find_devices
choose_model # MODEL, else the small model, which is fetched
BASE=$MODEL
export PYTHON GPUS CPU_BFLOAT16 NPROC OUTPUTS
mkdir -p "$OUTPUTS"
printf 'started\t%s\n' "$(date +%s)" >"$OUTPUTS/seconds.tsv"

if [ "$GPUS" -gt 0 ]; then # two stages run beside each other below: without a limit each would keep every core spinning
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
fi

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

# The reward model and DPO both start from the finetuned model: where there is a GPU, DPO runs beside RM and PPO.
dpo() { MODEL=$OUTPUTS/sft-merged stage dpo "${DPO[@]}"; }
beside=
if [ "$GPUS" -gt 0 ] && [ -z "${LAUNCH_DRY:-}" ]; then
    say "" && say "dpo: runs meanwhile; what it says comes after PPO, and is in $OUTPUTS/dpo.log"
    (unset MASTER_PORT && dpo) >"$OUTPUTS/dpo.log" 2>&1 &
    beside=$!
    trap 'kill $beside 2>/dev/null || true' EXIT
fi
MODEL=$OUTPUTS/sft-merged stage rm "${RM[@]}"
MODEL=$OUTPUTS/sft-merged REWARD_MODEL=$OUTPUTS/rm-merged stage ppo "${PPO[@]}"
if [ -n "$beside" ]; then
    status=0
    wait "$beside" || status=$?
    cat "$OUTPUTS/dpo.log" >&2
    [ $status = 0 ] || exit $status
else
    dpo
fi

# ── report ───────────────────────────────────────────────────────────────────────────────────────────────────────────
say "" && say "━━ report ━━"
run "$PYTHON" -m tools.report --outputs "$OUTPUTS"
