# The loss of OpenAI's gpt2 (12 layers of 768, 124M parameters) on OpenWebText; its weights come from the hub.
# $ python train.py config/eval_gpt2.py

init_from = "gpt2"
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a figure one can quote
