# A model learns to answer: on data/instruct, whose masks put the loss on the answers alone.
# $ python data/instruct/prepare.py --tokenizer=out-demo
# $ python train.py config/finetune_instruct.py
# $ python sample.py --out_dir=out-instruct --interactive
# A few of its parameters alone: --lora_rank=8 --learning_rate=1e-2 (docs/finetuning.md).

out_dir = "out-instruct"
init_from = "out-demo"
dataset = "instruct"
eval_interval = 100
eval_iters = 40
log_interval = 20

# 16 rows x 128 tokens, each of as many whole examples as fit; an epoch of the embedded ones is 203 iterations
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # at most the model's own context; longer examples are cut
dropout = 0.1

learning_rate = 3e-4
beta2 = 0.99
weight_decay = 0.0
lr_schedule = "linear"
warmup_iters = 20
max_iters = 400
lr_decay_iters = 400
min_lr = 0.0

compile = False  # small models on a CPU are done before it pays
