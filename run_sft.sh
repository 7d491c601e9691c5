#!/usr/bin/env bash
# Supervised finetuning: conversations → an adapter in outputs/sft.
#
#   bash run_sft.sh                                       every visible GPU, else one process on the CPU
#   MODEL=Qwen/Qwen3-0.6B bash run_sft.sh --max_steps 10  another model; more flags at the end, where the last one counts
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_sft.sh   the same on each machine, with its NODE_RANK
#   bash run_sft.sh --deepspeed zero2.json                with DeepSpeed
#
# Then: python merge_peft_adapter.py --lora_model outputs/sft --output_dir outputs/sft-merged
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
find_devices                      # sets NPROC and PRECISION
choose_model "$OUTPUTS/pt-merged" # sets MODEL: the pretrained model if it is there

# --model_max_length is also the length of a packed row; raise it for long conversations.
launch supervised_finetuning.py \
    --model_name_or_path "$MODEL" \
    --train_file_dir data/finetune/train \
    --validation_file_dir data/finetune/validation \
    --output_dir "$OUTPUTS/sft" \
    "${PRECISION[@]}" \
    --model_max_length 1024 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 8 \
    --gradient_accumulation_steps 1 \
    --num_train_epochs 2 \
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
