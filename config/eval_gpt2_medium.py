# The loss of OpenAI's gpt2-medium (24 layers of 1024, 350M parameters) on OpenWebText; its weights come from the hub.
# $ python train.py config/eval_gpt2_medium.py

init_from = "gpt2-medium"
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a figure one can quote
