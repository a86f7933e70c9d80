# GPT-2 124M on OpenWebText, to a validation loss of about 2.85: some four days on 8 A100s of 40 GB (nanoGPT's figures).
# $ python data/openwebtext/prepare.py
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = False  # True logs to Weights & Biases too
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences x 1024 tokens x 40 micro-steps = 491,520 tokens an iteration, shared by however many processes there are
# (1, 2, 4, 5, 8, 10, 20 or 40)
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens in all
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
