# The recipe of the Chinese GPT-2 story tutorials, GPT-2's small shape on novels: one GPU of 8 GB or more, hours.
# $ python data/chinese/prepare.py --input=novels/
# $ python train.py config/train_chinese_novel.py

out_dir = "out-chinese-novel"
dataset = "chinese"
eval_interval = 1000
eval_iters = 100
log_interval = 10
sample_interval = 1000

# 16 sequences x 200 characters x 6 micro-steps = 19,200 characters an iteration
batch_size = 16
gradient_accumulation_steps = 6
block_size = 200

n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.1
bias = True

learning_rate = 1.5e-4
adam_eps = 1e-9
epochs = 100
warmup_iters = 4000
lr_schedule = "linear"
min_lr = 0.0
