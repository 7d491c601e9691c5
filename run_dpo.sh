#!/usr/bin/env bash
# Direct preference optimization: preference pairs → an adapter in outputs/dpo, without a reward model.
#
#   bash run_dpo.sh                                       every visible GPU, else one process on the CPU
#   MODEL=Qwen/Qwen3-0.6B bash run_dpo.sh --max_steps 10  another model; more flags at the end, where the last one counts
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_dpo.sh   the same on each machine, with its NODE_RANK
#   bash run_dpo.sh --deepspeed zero2.json                with DeepSpeed
#
# Then: python merge_peft_adapter.py --lora_model outputs/dpo --output_dir outputs/dpo-merged
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
find_devices                       # sets NPROC and PRECISION
choose_model "$OUTPUTS/sft-merged" # sets MODEL: the finetuned model if it is there

# --beta: how strongly the model is held to the one it starts from. A batch counts pairs.
launch dpo_training.py \
    --model_name_or_path "$MODEL" \
    --train_file_dir data/reward/train \
    --validation_file_dir data/reward/validation \
    --output_dir "$OUTPUTS/dpo" \
    "${PRECISION[@]}" \
    --beta 0.1 \
    --max_source_length 1024 \
    --max_target_length 512 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 8 \
    --gradient_accumulation_steps 1 \
    --num_train_epochs 1 \
    --learning_rate 1e-4 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.1 \
    --logging_steps 10 \
    --eval_strategy steps \
    --eval_steps 0.2 \
    --save_steps 500 \
    --save_total_limit 3 \
    --seed 42 \
    "$@"
