"""What `scripts/train_recall_model.py` is made of."""
