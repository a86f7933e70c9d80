# GPT-2 XL, a few steps further on tiny shakespeare: minutes on one large GPU; --init_from=gpt2 for a smaller one.
# $ python data/shakespeare/prepare.py
# $ python train.py config/finetune_shakespeare.py

import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"

# 1 sequence x 1024 tokens x 32 micro-steps = 32,768 tokens an iteration; an epoch is 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# a small and constant rate
learning_rate = 3e-5
decay_lr = False
