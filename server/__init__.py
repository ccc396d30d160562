"""What happens where the model is: the round loop, who is asked, late updates, boundary, evaluation; Flower's nodes."""
