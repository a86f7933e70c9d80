# GPT-2 124M's shape in a newer architecture, to a validation loss of 3.28 on FineWeb: not measured (docs/speedruns.md).
# $ python data/hf/prepare.py --path=HuggingFaceFW/fineweb --name=sample-10BT --tokenizer=gpt2 --dest=data/fineweb
# $ torchrun --standalone --nproc_per_node=8 train.py config/speedrun_gpt2_124m.py
# $ python train.py config/speedrun_gpt2_124m.py
#
# On OpenWebText: --dataset=openwebtext --target_val_loss=2.85

out_dir = "out-speedrun-gpt2-124m"
dataset = "fineweb"
target_val_loss = 3.28
eval_interval = 250
eval_iters = 100
log_interval = 10
save_interval = 250

# 16 sequences x 1024 tokens x 32 micro-steps = 524,288 tokens a step, shared by however many processes there are
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 4 * 8

n_layer = 12
n_head = 6  # of 128, as in the records of modded-nanogpt
n_embd = 768
act = "relu2"
pos = "rope"
norm = "rmsnorm"
qk_norm = True
tied = False
zero_init = True
smear = 3

optim = "muon"
muon_learning_rate = 0.02
muon_momentum = 0.95
muon_momentum_warmup = 300
learning_rate = 0.003
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
max_iters = 5000  # 2.6 billion tokens
lr_decay_iters = 5000
lr_schedule = "wsd"
decay_frac = 0.4
warmup_iters = 0
min_lr = 0.0
