#!/usr/bin/env bash
# Continued pretraining: plain text → an adapter in outputs/pt.
#
#   bash run_pt.sh                                       every visible GPU, else one process on the CPU
#   MODEL=Qwen/Qwen3-0.6B bash run_pt.sh --max_steps 10  another model; more flags at the end, where the last one counts
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_pt.sh   the same on each machine, with its NODE_RANK
#   bash run_pt.sh --deepspeed zero2.json                with DeepSpeed
#
# Then: python merge_peft_adapter.py --lora_model outputs/pt --output_dir outputs/pt-merged
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
find_devices # sets NPROC and PRECISION
choose_model # sets MODEL; the small model is fetched if it is missing

# The learning rate is for an adapter; --use_peft False trains all weights and wants a tenth of it.
launch pretraining.py \
    --model_name_or_path "$MODEL" \
    --train_file_dir data/pretrain/train \
    --validation_file_dir data/pretrain/validation \
    --output_dir "$OUTPUTS/pt" \
    "${PRECISION[@]}" \
    --block_size 1024 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --num_train_epochs 1 \
    --learning_rate 2e-4 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.05 \
    --logging_steps 10 \
    --eval_strategy steps \
    --eval_steps 0.2 \
    --save_steps 500 \
    --save_total_limit 3 \
    --seed 42 \
    "$@"
