"""What happens where the model is: the round loop, cohort, boundary and evaluation."""
