#!/usr/bin/env bash
# Proximal policy optimization: prompts, answered by the model and scored by a reward model → an adapter in outputs/ppo.
#
#   bash run_ppo.sh                                       every visible GPU, else one process on the CPU
#   MODEL=Qwen/Qwen3-0.6B REWARD_MODEL=OpenAssistant/reward-model-deberta-v3-large-v2 bash run_ppo.sh
#                                                         other models; more flags at the end, where the last one counts
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_ppo.sh   the same on each machine, with its NODE_RANK
#   bash run_ppo.sh --deepspeed zero2.json                with DeepSpeed
#
# Then: python merge_peft_adapter.py --lora_model outputs/ppo --output_dir outputs/ppo-merged
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
find_devices                       # sets NPROC and PRECISION
choose_model "$OUTPUTS/sft-merged" # sets MODEL: the finetuned model if it is there

# The reward model: run_rm.sh's, merged or as its adapter, or any sequence classifier with one score.
if [ -z "${REWARD_MODEL:-}" ]; then
    REWARD_MODEL=$OUTPUTS/rm-merged
    [ -f "$REWARD_MODEL/config.json" ] || REWARD_MODEL=$OUTPUTS/rm
    [ -d "$REWARD_MODEL" ] || [ -n "${LAUNCH_DRY:-}" ] ||
        fail "no reward model: there is no $OUTPUTS/rm-merged and no $OUTPUTS/rm. bash run_rm.sh trains one, or give REWARD_MODEL"
fi
say "reward model: $REWARD_MODEL"

# A rollout: --batch_size prompts a process are answered and scored, then learned from --ppo_epochs times in pieces of
# --mini_batch_size. The KL penalty is steered so that an answer lies --target_kl nats from the model that PPO starts from.
launch ppo_training.py \
    --model_name_or_path "$MODEL" \
    --reward_model_name_or_path "$REWARD_MODEL" \
    --train_file_dir data/finetune/train \
    --validation_file_dir data/finetune/validation \
    --output_dir "$OUTPUTS/ppo" \
    "${PRECISION[@]}" \
    --max_source_length 512 \
    --max_target_length 256 \
    --batch_size 32 \
    --mini_batch_size 8 \
    --ppo_epochs 2 \
    --num_train_epochs 4 \
    --init_kl_coef 0.2 \
    --target_kl 6 \
    --per_device_eval_batch_size 32 \
    --learning_rate 2e-4 \
    --lr_scheduler_type constant \
    --lora_dropout 0 \
    --logging_steps 1 \
    --eval_strategy steps \
    --eval_steps 0.2 \
    --save_steps 100 \
    --save_total_limit 3 \
    --seed 42 \
    "$@"
