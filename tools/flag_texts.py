"""Words for `tools.document_flags`: the Chinese of every help text."""

# Flag of transformers -> what it does, in Chinese; the English is in stagewise/config/transformers_flags.py.
TRAINING: dict[str, str] = {
    "do_train": "进行训练。--do_train 与 --do_eval 都不给时：训练；有验证数据则也评估。",
    "do_eval": "进行评估。单独给出（没有 --do_train）时：只评估现有模型，然后结束。",
    "per_device_train_batch_size": "每个进程一次训练的行数；RM 与 DPO 中是偏好对的数量。",
    "per_device_eval_batch_size": "验证时的同一数量；验证时不打包。",
    "gradient_accumulation_steps": "多少个批次合成一次优化器更新。",
    "num_train_epochs": "遍历训练数据的次数。",
    "max_steps": "优化器步数，优先于轮数；-1：按轮数。",
    "learning_rate": "最高学习率。",
    "lr_scheduler_type": "学习率如何下降：linear、cosine、constant……",
    "warmup_steps": "学习率上升所用的步数；小于 1 时是占总步数的比例。",
    "weight_decay": "AdamW 的权重衰减。",
    "max_grad_norm": "梯度范数的上限；0 表示不裁剪。",
    "optim": "优化器。",
    "bf16": "用 bfloat16 计算（混合精度）;CPU 上也可以。",
    "fp16": "用 float16 计算；需要 GPU。",
    "gradient_checkpointing": "减少激活占用的内存，换来更长的时间。",
    "eval_strategy": "训练中何时评估：no、steps、epoch。",
    "eval_steps": "每隔多少步评估；小于 1 时是占总步数的比例；默认同 --logging_steps。",
    "eval_on_start": "第一步之前也评估一次。",
    "save_strategy": "何时保存检查点：no、steps、epoch、best。",
    "save_steps": "每隔多少步保存；小于 1 时是占总步数的比例。",
    "load_best_model_at_end": "结束时取最好的检查点，而不是最后一步。",
    "metric_for_best_model": "“最好”按哪个指标，例如 eval_loss 或 eval_accuracy。",
    "resume_from_checkpoint": "True：从最后一个完整的检查点继续；或给出检查点目录。",
    "seed": "所有随机性的种子。",
    "data_seed": "训练行顺序的种子；默认同 --seed。",
    "use_cpu": "有 GPU 也在 CPU 上运行。",
    "deepspeed": "DeepSpeed 的配置：zero2.json 或 zero3.json。",
    "ddp_timeout": "进程之间相互等待的最长秒数。",
    "dataloader_num_workers": "负责组批的进程数。",
    "train_sampling_strategy": "训练行的顺序：random、sequential，或 group_by_length（长度相近的放在一起）。",
    "run_name": "在跟踪工具中的运行名称。",
}

# Help text of a dataclass field, or a reason in stagewise/config/command_line.py -> the same in Chinese.
CHINESE: dict[str, str] = {
    "Folder for the run's results.": "本次运行写入的目录。",
    "Maximum tokens of an answer for a reward model; for generated answers see --max_new_tokens.": (
        "奖励模型所评分的回答的词元数；模型自己回答的长度用 --max_new_tokens。"
    ),
    # ModelArguments
    "Model directory, or a hub name.": "模型目录，或 hub 上的名称。",
    "Tokenizer directory or hub name; default: the model's.": "分词器；默认用模型自带的。",
    "Architecture you expect (llama, qwen3, bloom …); checked against the config.": (
        "你认为的模型架构（llama、qwen3、bloom……）；会与配置核对。"
    ),
    "Where downloads and encoded data are cached; encoded data is cached only here.": (
        "下载内容与编码后数据的缓存目录；只有给出它，编码后的数据才会缓存。"
    ),
    "Branch, tag or commit of a hub model.": "hub 模型的分支、标签或提交。",
    "Token for a private hub model.": "访问私有 hub 模型的令牌。",
    "Precision of the weights: auto (the checkpoint's), float32, bfloat16, float16.": (
        "权重的精度：auto（与检查点相同）、float32、bfloat16、float16。"
    ),
    "`auto` spreads one process's model over its GPUs; not with torchrun.": (
        "`auto` 把一个进程的模型分布到多个 GPU 上；不与 torchrun 同用。"
    ),
    "Run Python code that the model repository ships.": "运行模型仓库自带的 Python 代码。",
    "Load the linear layers in 4 bits (nf4, bitsandbytes).": "线性层以 4 位保存（nf4,bitsandbytes）。",
    "Load the linear layers in 8 bits (bitsandbytes).": "线性层以 8 位保存（bitsandbytes）。",
    "Mixture of experts: add the router load-balancing loss.": (
        "混合专家模型：加上路由器的损失，使各专家得到均衡使用。"
    ),
    "Weight of --router_aux_loss; default: the checkpoint's own.": (
        "--router_aux_loss 的权重；默认用检查点自带的值。"
    ),
    "With 4-bit loading: also quantize experts that are stored as one 3-D parameter; False: they stay in 16 bit.": (
        "4 位时，合成一个三维参数的专家权重也一起量化；False：保持 16 位。"
    ),
    "4-bit loading as in QLoRA: nf4 with double quantization.": ("QLoRA 的 4 位：nf4，缩放系数再量化一次。"),
    "RoPE scaling for a longer context: linear, dynamic (NTK), yarn or longrope.": (
        "缩放位置以加长上下文：linear、dynamic(NTK)、yarn 或 longrope。"
    ),
    "RoPE scaling factor; default: as large as the run's sequence length needs.": (
        "模型原有上下文的倍数；默认：本次运行的长度所需的倍数。"
    ),
    "For longrope: JSON file with the lists short_factor and long_factor.": (
        "longrope：含有 short_factor 和 long_factor 两个列表的 json 文件。"
    ),
    "Use FlashAttention if installed, else torch's fastest exact attention on this GPU.": (
        "已安装则用 FlashAttention，否则用 torch 在该 GPU 上最快的精确注意力。"
    ),
    "Train with shifted sparse attention (S²-Attn, LongLoRA); evaluation uses full attention.": (
        "训练时使用移位稀疏注意力（S²-Attn）；其他时候为完整注意力。"
    ),
    "With --shift_attn: group size as a share of the row length.": "--shift_attn：一组占行长的比例。",
    # DataArguments
    "Training file or folder (searched recursively), several joined by commas, or a .yaml list.": (
        "文件，或目录（连同子目录）；多个用逗号连接；或 .yaml 列表。"
    ),
    "Sampling weights of the sources of --train_file_dir, joined by commas: 0.7,0.3.": (
        "--train_file_dir 各来源的比例，用逗号连接：0.7,0.3。"
    ),
    "Drop duplicate training records.": "去掉与前面重复的训练数据。",
    "Validation file or folder, in the same forms.": "验证数据，同上。",
    "Dataset for the `datasets` library: hub name or local folder.": "`datasets` 数据集：hub 名称或本地目录。",
    "Configuration name of that dataset.": "该数据集的配置名。",
    "Percentage of the training records to hold out when no validation set is given.": (
        "没有给出验证集时，从训练数据中留出的百分比。"
    ),
    "Use at most this many training records; in PT rows of --block_size; -1 = all.": (
        "最多使用多少条训练数据，PT 中为多少行 --block_size；-1 = 全部。"
    ),
    "The same for validation records; in PT blocks, which are not packed.": "验证数据，同上；PT 中为块数，不打包。",
    "Processes that encode the data; default: one per core, at most four.": "编码进程数；默认每核一个，最多四个。",
    "Ignore the encoded data in --cache_dir and encode again.": "重新编码 --cache_dir 中已有的数据。",
    "error: stop at the first malformed record; skip: count it and write it to rejected.jsonl.": (
        "error：遇到第一条坏数据就停止；skip：计数并写入 rejected.jsonl。"
    ),
    # ChatArguments, PairArguments, LanguageModelArguments
    "Chat template of template.py; default: the tokenizer's own, else vicuna.": (
        "template.py 中的对话模板；默认：分词器自带的，没有则 vicuna。"
    ),
    "Use --template_name even if the model was trained with another template.": (
        "模型用另一个模板训练过，也照用 --template_name。"
    ),
    "Whether a thinking model's responses start with a thinking block; default: the model's own setting.": (
        "思考模型的回答以思考开头；False：没有思考。默认：按模型自己的模板。"
    ),
    "Read the files while training, with constant memory; needs --max_steps.": (
        "边训练边读文件，内存占用不变；需要 --max_steps。"
    ),
    "Size of the shuffle buffer of --streaming, in records.": "--streaming 在多少条数据之中打乱。",
    "Compute the loss only on the response to the last question.": ("只学习最后一个问题之后的话，不学习之前各轮。"),
    "Accepted for older commands; the loss is always computed on every assistant turn.": (
        "默认做法的另一个名称：学习助手的每一轮。"
    ),
    "Side from which whole turns of a conversation that is too long are dropped: right or left.": (
        "过长时从哪一端丢掉整轮：right（末尾）或 left（开头）。"
    ),
    "Maximum tokens of the prompt, including earlier turns.": "提示（含历史）的 token 数上限。",
    "Maximum tokens of a response.": "回答的 token 数上限。",
    "Pack several records into one row, each attending only to itself; False: pad.": (
        "多条数据打包进一行，互不可见；False：逐条填充。"
    ),
    "NEFTune: uniform noise on the embeddings within ±alpha / sqrt(L d).": (
        "NEFTune：在嵌入上加 ±alpha / sqrt(L d) 之内的均匀噪声。"
    ),
    # AdapterArguments, PredecessorArguments
    "Train an adapter; False trains all weights.": "训练适配器；False 表示训练全部权重。",
    "full (the same as --use_peft False), lora, adalora, prompt_tuning, p_tuning or prefix_tuning.": (
        "full（等同于 --use_peft False）、lora、adalora、prompt_tuning、p_tuning 或 prefix_tuning。"
    ),
    "Modules to adapt: `all` linear layers, or names joined by commas.": "`all` 表示所有线性层，或用逗号连接的名称。",
    "Rank r of the adapter.": "适配器的秩 r。",
    "LoRA alpha: the adapter's output is scaled by alpha / r.": "缩放：适配器的输出乘以 alpha / r。",
    "Dropout on the adapter's input.": "适配器输入上的 dropout。",
    "Modules trained in full in addition to the adapter, e.g. embed_tokens,lm_head.": (
        "与适配器一起完整训练的模块，例如 embed_tokens,lm_head。"
    ),
    "Adapter to continue training from.": "在这个适配器的基础上继续训练。",
    "Rank-stabilized LoRA: scale by alpha / sqrt(r).": "LoRA 的缩放为 alpha / sqrt(r)(rsLoRA)。",
    "DoRA: decompose weights into magnitude and direction; LoRA updates the direction.": (
        "把权重拆成大小与方向，LoRA 只改变方向（DoRA）。"
    ),
    "LoRA initialization: default (B = 0), gaussian, or pissa (the base's principal singular vectors).": (
        "LoRA 的起点：default(B = 0)、gaussian，或 pissa（基座最大的奇异方向）。"
    ),
    "LoRA+: ratio of B's learning rate to A's.": "LoRA+:B 的学习率是 A 的多少倍。",
    "AdaLoRA: initial rank of each matrix.": "AdaLoRA：每个矩阵最初的秩。",
    "AdaLoRA: target average rank.": "AdaLoRA：结束时的平均秩。",
    "AdaLoRA: warmup steps before ranks are reduced.": "AdaLoRA：秩开始下降之前的步数。",
    "AdaLoRA: final steps with fixed ranks.": "AdaLoRA：最后多少步内秩不再改变。",
    "AdaLoRA: steps between rank reallocations.": "AdaLoRA：每隔多少步重新选择一次秩。",
    "AdaLoRA: EMA coefficient of the sensitivity.": "AdaLoRA：权重重要性滑动平均的系数。",
    "AdaLoRA: EMA coefficient of the uncertainty.": "AdaLoRA：重要性不确定度滑动平均的系数。",
    "AdaLoRA: weight of the orthogonality regularization.": "AdaLoRA：保持矩阵正交的那一项的权重。",
    "Prompt tuning, P-tuning and prefix tuning: number of virtual tokens.": (
        "prompt tuning、P-tuning 与 prefix tuning：文本之前要学习的虚拟 token 数。"
    ),
    "P-tuning, and prefix tuning with --prefix_projection: width of the network that the virtual "
    "tokens are trained through; default: the embedding's.": (
        "P-tuning，以及带 --prefix_projection 的 prefix tuning：训练虚拟 token 所经过的网络的宽度；默认与嵌入相同。"
    ),
    "Prefix tuning: train the prefix through a two-layer MLP.": ("prefix tuning：让前缀经过一个两层网络来训练。"),
    "With --shift_attn: also train embeddings and norms in full.": (
        "与 --shift_attn 同用时：嵌入和归一化层与适配器一起完整训练。"
    ),
    "SFT adapter to start from: merged into the model in memory, and so part of the reference. "
    "--peft_path continues from an adapter of this stage, which the reference is without.": (
        "作为起点的 SFT 适配器：在内存中合并进模型，因此也是参考模型的一部分。"
        "--peft_path 则是继续训练本阶段的适配器，参考模型不含它。"
    ),
    # stages
    "Tokens per row; longer documents are split into blocks.": "一行的 token 数；更长的文档切成多块。",
    "Maximum tokens of a conversation, and of a packed row.": "一段对话的 token 数上限，也是打包后一行的长度。",
    "Compute the loss on the whole conversation, including prompts.": "整段对话都参与学习，包括提问。",
    "Strength of the pull towards the reference model.": "模型被约束在参考模型附近的强度。",
    "Reference model for full training; default: a frozen copy of the initial model.": (
        "训练全部权重时的参考模型；默认：训练开始时的模型。"
    ),
    "Reward model: of this project (merged, or its adapter), or any sequence classifier; one without "
    "a chat template is given prompt and answer as a pair of texts.": (
        "奖励模型：本项目的（合并后的，或其适配器），或任意序列分类模型；没有对话模板的，得到的是提示与回答这一对文本。"
    ),
    "For a classifier with several labels: the label whose logit is the score.": (
        "分类模型有多个标签时：用哪个标签的 logit 作为分数。"
    ),
    "Prompts per rollout and process.": "一次 rollout 的提示数，每个进程。",
    "Responses per forward pass and process; default: --per_device_train_batch_size.": (
        "一次前向计算的回答数，每个进程；默认同 --per_device_train_batch_size。"
    ),
    "Optimization epochs over each rollout.": "一次 rollout 被学习的遍数。",
    "Rollouts of the run. Or --max_steps, which counts optimizer steps: a rollout has --ppo_epochs * "
    "--batch_size / --mini_batch_size / --gradient_accumulation_steps. Or --num_train_epochs: passes over "
    "the prompts.": (
        "整个运行的 rollout 次数。或用 --max_steps，它计的是优化器步数：一次 rollout 有 "
        "--ppo_epochs * --batch_size / --mini_batch_size / --gradient_accumulation_steps 步。"
        "或用 --num_train_epochs：遍历提示的次数。"
    ),
    "Sampling temperature; also applied to log-probabilities and KL.": ("生成回答的温度，也用于对数概率和 KL。"),
    "Nucleus sampling: smallest set of tokens whose probabilities sum to this.": (
        "只从概率之和达到该值的最可能的 token 中抽取。"
    ),
    "Sample from this many most likely tokens; 0 = all.": ("只从最可能的若干个 token 中抽取；0 = 全部。"),
    "Initial KL coefficient: reward subtracted per nat of KL to the reference.": (
        "token 每偏离参考模型一个 nat 所扣的奖励，初始值。"
    ),
    "Adapt the KL coefficient after each rollout towards --target_kl; False: keep it fixed.": (
        "每次 rollout 之后向 --target_kl 调整该系数；False：保持不变。"
    ),
    "Target KL in nats per response (default 6). The adaptive controller steers towards it; with "
    "--early_stopping, also the KL to the sampling policy at which updates on a rollout stop.": (
        "每个回答的 nat 数，默认 6:--adap_kl_ctrl 所趋向的、与参考模型的 KL；使用 --early_stopping 时，"
        "与给出回答的策略的 KL 超过它，就结束对这些回答的更新。"
    ),
    "Skip the remaining updates on a rollout once the policy's KL to the sampling policy exceeds --target_kl.": (
        "策略偏离原来达到 --target_kl 时，略去这次 rollout 余下的更新。"
    ),
    "Constant subtracted from every score. Without it, scores are whitened over the rollout of all processes.": (
        "从每个分数中减去的值。不给时改为对分数做白化：减去所有进程这次 rollout 的平均值，再除以标准差。"
        "两者不会同时进行。"
    ),
    "Penalty subtracted from the score of a response without an end token.": (
        "回答没有自行结束时，首先从其分数中扣去的值。"
    ),
    "Discount factor gamma.": "对以后奖励的折扣。",
    "Lambda of generalized advantage estimation.": "广义优势估计的 lambda。",
    "Clip range of the policy ratio.": "策略比率的裁剪范围。",
    "Clip range of the value function.": "价值头变化的裁剪范围。",
    "Coefficient of the value loss.": "价值损失的权重。",
    "Responses per validation prompt; its metrics are their means.": "每个验证提示回答几次；它的各项数值取平均。",
    # StageArguments
    "Replace a finished run in --output_dir.": "替换 --output_dir 中已完成的运行。",
    "Check arguments, data and one batch, report the estimated memory and time, and stop.": (
        "只检查参数、数据和一个批次，预估内存与时间，然后停止。"
    ),
    "Write the metrics of each validation record to eval_records/step-N.jsonl.": (
        "把每条验证数据的数值写入 eval_records/step-N.jsonl。"
    ),
    "Validation records whose responses (for a reward model: scores) each evaluation saves to "
    "eval_samples/, TensorBoard and report.html. 0: none.": (
        "每次评估时另外展示多少条验证数据：模型对它们的回答（eval_samples/、TensorBoard、report.html）;"
        "奖励模型则是分数。0：不展示。"
    ),
    "Plain log lines on a terminal: no progress bars.": (
        "在终端上也只输出普通的行：没有原地刷新的一行，也没有进度条。"
    ),
    "Trackers, joined by commas: tensorboard, wandb …; or none.": (
        "跟踪工具，用逗号连接：tensorboard、wandb……；none 表示不用。"
    ),
    "Folder for TensorBoard files; default: logs/ in the output directory.": "TensorBoard 的文件；默认：输出目录中的 "
    "logs/。",
    "Steps between log entries.": "每隔多少步记一次日志。",
    "Log the first step too.": "第一步也记日志。",
    "Exclude NaN and infinite losses from the logged mean; such steps are skipped either way.": (
        "日志的平均损失不计入 NaN 和无穷大；无论如何，这样的步都会被跳过。"
    ),
    "Number of complete checkpoints to keep; 0: all.": "保留多少个完整的检查点；0 为全部。",
    "See torch's DDP.": "见 torch 的 DDP。",
    "Must stay False: batches contain only what is needed.": "保持 False：批次里只有需要的内容，没有别的。",
    # ChatModelArguments
    "Model directory or hub name; default: the base named by --lora_model.": (
        "模型目录，或 hub 上的名称；默认：--lora_model 所记录的基座。"
    ),
    "Adapter for the model: LoRA, AdaLoRA, prompt, P- or prefix tuning; a folder or hub name.": (
        "放在其上的适配器：LoRA、AdaLoRA、prompt tuning、P-tuning 或 prefix tuning；目录或 hub 上的名称。"
    ),
    "Default: the adapter's, else the model's.": "默认：适配器目录里的，没有则用模型的。",
    "False: a thinking model answers without thoughts. Default: the model's own setting.": (
        "False：会思考的模型不经思考直接回答。默认按模型自己的方式。"
    ),
    "RoPE scaling factor; default: 2.": "模型自身上下文的多少倍；默认 2。",
    "auto (a GPU if there is one), cpu or cuda.": "auto（有 GPU 就用 GPU）、cpu 或 cuda。",
    "Branch, tag or commit of a hub model; not the adapter's.": "hub 模型的分支、标签或提交；不用于适配器。",
    "Where downloads are cached.": "下载内容的缓存目录。",
    # SamplingArguments
    "Sample tokens; False: greedy decoding.": "随机采样 token;False：总是取最可能的。",
    "Typical sampling: the tokens closest to the expected information, up to this total probability.": (
        "只从惊奇程度最接近平均的、概率之和达到该值的 token 中采样（typical sampling）。"
    ),
    "Sample from the most probable tokens with this share of the entropy.": (
        "只从最可能的、占到熵的这一比例的 token 中采样。"
    ),
    "Exclude tokens below this probability, for example 0.0005.": "去掉概率低于该值（例如 0.0005）的 token。",
    "The same with a threshold that falls with the entropy, for example 0.001.": (
        "同上，但在许多 token 都可能时去掉得更少；例如 0.001。"
    ),
    "Words that must not be generated: their token sequences, with and without a leading space.": (
        "不说的词：它们的 token（前面带空格与不带空格的两种）不会连续出现。"
    ),
    "Strings that end an answer and are not part of it.": "使回答结束的文本；它们不属于回答。",
    "Minimum number of tokens before an end marker.": "说满这么多个 token 之前不会说结束符。",
    "--num_beams: an answer's log-probability is divided by its length to this power; above 0 favors "
    "long ones, below 0 short ones.": (
        "--num_beams：回答的对数概率除以其长度的该次幂；大于 0 偏向长回答，小于 0 偏向短回答。"
    ),
    "--num_beams: the search ends with as many whole answers (True), where a better one is unlikely "
    "(False), or where none can come (never).": (
        "--num_beams：有同样多个完整回答时结束（True），不大可能有更好的时结束（False），不可能有更好的时才结束（never）。"
    ),
    "Sampling temperature: below 1 sharper, above 1 flatter; 0 = no sampling.": (
        "小于 1：较可能的 token 出现得更多；大于 1：更少；0 = 不采样。"
    ),
    "Nucleus sampling: the smallest set of tokens with this total probability.": (
        "核采样：只从概率之和达到该值的最少几个 token 中采样。"
    ),
    "Sample from the k most probable tokens; 0 = all.": "只从最可能的 k 个 token 中采样；0 = 全部。",
    "Exclude tokens whose probability is below this fraction of the highest one.": (
        "去掉概率低于最可能 token 的这一比例的 token。"
    ),
    "Above 1: tokens that already occurred become less probable.": "大于 1：说过的内容变得不那么可能。",
    "No sequence of n tokens occurs twice; 0 = no limit.": "连续的 n 个 token 不说第二遍；0 = 不限制。",
    "Maximum tokens of an answer; default: the model's own, else 512, at most half the context.": (
        "一个回答最多多少个 token；默认用模型自己的，否则 512，至多为上下文的一半。"
    ),
    "Beam search with this many beams; not with sampling.": "在这么多个候选中做束搜索；不与采样同用。",
    "The same seed gives the same answer to the same prompt.": "同样的种子对同样的提示给出同样的回答。",
    # InferenceArguments
    "Chat with the model in the terminal.": "在终端里与模型对话。",
    "System prompt for records without one; default: the template's own.": (
        "没有给出系统提示时所用的系统提示；默认：模板自己的。"
    ),
    "Prompts to answer: .jsonl, .json, .csv, .parquet in any format of docs/data.md, or .txt.": (
        "要回答的提示：.jsonl、.json、.csv、.parquet，格式为 docs/data.md 中的任何一种；或 .txt。"
    ),
    "Output file for the answers, as jsonl.": "回答写入的文件，jsonl 格式。",
    "Name of the answer's field in a record.": "回答写入数据的哪个字段。",
    "Prompts per batch and process.": "一个进程一次回答多少个提示。",
    "A prompt that is too long or has no question: error, or skip (the reason in place of an answer).": (
        "提示过长或没有提问时：error 报错，skip 跳过（没有回答，但有原因）。"
    ),
    "Replace --output_file instead of continuing it.": "替换 --output_file，而不是接着写。",
    "Without --lora_model: the adapter in this folder is used, if there is one.": (
        "没有 --lora_model 时：其中若有适配器，就放在基座上。"
    ),
    "Without --lora_model: searched for an adapter after --checkpoint_dir.": (
        "没有 --lora_model 时：在 --checkpoint_dir 之后从这里寻找适配器。"
    ),
    # EvaluationArguments
    "Output folder for metrics, answers and the page.": "指标、回答和页面写入的目录。",
    "The same as --base_model.": "与 --base_model 相同。",
    "File, or folder (searched recursively), of conversations, or of pairs for a reward model.": (
        "文件，或连同子目录一起查找的目录：对话；奖励模型则是偏好对。"
    ),
    "Use at most this many records, and questions per benchmark subject; -1 = all.": (
        "最多用这么多条数据，以及基准测试每个科目这么多题；-1 表示全部。"
    ),
    "Rows per forward pass.": "一次前向计算的行数。",
    "Scores the answers, as in PPO: a reward model, merged or its adapter, or any classifier.": (
        "像 PPO 中那样给回答打分：奖励模型（合并后的或其适配器），或任何分类模型。"
    ),
    "The label whose logit is the score.": "它的哪个标签是分数。",
    "mmlu, cmmlu, ceval, or any task of lm-eval; several joined by commas.": (
        "mmlu、cmmlu、ceval 或 lm-eval 的任何任务；多个用逗号连接。"
    ),
    "Folder with the benchmarks' published CSV files; default: the hub.": (
        "数据集所发布的 CSV 文件所在的目录；默认：hub。"
    ),
    "Few-shot examples; default: 5 for MMLU, CMMLU and C-Eval, else the task's own.": (
        "每个问题之前的示例数；默认：三者为 5，其他按任务自己的规定。"
    ),
    "Benchmarks: format questions and examples with the model's chat template.": (
        "基准测试：问题和示例使用模型的对话模板。"
    ),
    "Output directories of evaluations to compare.": "各次评估的输出目录，并排比较。",
    "Replace an evaluation in --output_dir.": "替换 --output_dir 中已有的评估。",
    # WebArguments
    "Address to listen on; 0.0.0.0: all addresses of this machine.": "监听的地址；0.0.0.0：本机的所有地址。",
    "Port to listen on.": "监听的端口。",
    "Host names allowed in requests beside this machine's own, such as a proxy's.": (
        "除本机名称外，请求还可以使用的主机名，例如前置代理的域名。"
    ),
    "Require a login: NAME:PASSWORD, or a file with one per line.": "要求登录：NAME:PASSWORD，或每行一个的文件。",
    "Also open a public address through gradio's servers; needs --auth.": (
        "同时通过 gradio 的服务器打开一个公开地址；需要 --auth。"
    ),
    "Initial system prompt of every conversation.": "每个对话最初的系统提示。",
    "Title of the page.": "页面顶部的文字。",
    # MergeArguments
    "The adapter's directory.": "适配器的目录。",
    "Output folder for the merged model.": "合并后的模型写入的目录。",
    "Default: the base named in adapter_config.json.": "默认：adapter_config.json 中记录的基座。",
    "Default: the adapter's, else the base's.": "默认：适配器目录里的，没有则用基座的。",
    "Add rows to the embedding if the tokenizer needs them.": "给嵌入增加行，直到容纳分词器。",
    "Replace an existing --output_dir.": "替换 --output_dir 中已有的内容。",
    "Expected architecture; checked against the config.": "你认为的模型架构；会与配置核对。",
    "Where a hub base is cached.": "hub 基座的缓存目录。",
    "Branch, tag or commit of a hub base.": "hub 基座的分支、标签或提交。",
    "Token for a private hub base.": "访问私有 hub 基座的令牌。",
    "Run Python code that the base ships.": "运行基座自带的 Python 代码。",
    # arguments.ALWAYS_SO
    "transformers 5 has one kind of tokenizer, the fast one": "transformers 5 只有一种分词器，即快速的那种",
    "weights are always saved as safetensors": "权重总是保存为 safetensors",
    "torch's own autocast is used": "使用 torch 自己的 autocast",
    "tokens per second are always logged": "每秒 token 数总会记入日志",
    "weights are always loaded without a second copy": "加载权重时从不多留一份副本",
    # arguments.NOT_YET
    "train with --qlora; tools.quantize_model writes the CPM form of a finished model": (
        "训练时用 --qlora;tools.quantize_model 可把训练好的模型写成 CPM 形式"
    ),
}
