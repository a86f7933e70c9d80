# A model of yours, a little further on a text of yours, with the model's own vocabulary and a small constant rate.
# $ python data/chinese/prepare.py --input=more.txt --tokenizer=out-chinese --dest=data/more
# $ python train.py config/finetune_chinese.py
# From another model: --init_from=out-demo, a Hugging Face folder, or gpt2 (its text with --tokenizer=gpt2).

out_dir = "out-more"
init_from = "out-chinese"
dataset = "more"
eval_interval = 25
eval_iters = 40
log_interval = 5
sample_interval = 50

# 32 sequences x 256 tokens = 8,192 tokens an iteration
gradient_accumulation_steps = 4
batch_size = 8
block_size = 256  # at most the model's own
dropout = 0.1  # a small text is soon learnt by heart: the best evaluation is kept, and a run that gets worse ends
patience = 5

learning_rate = 1e-4
decay_lr = False
max_iters = 500
