"""What happens where the data are: a request comes in, local training, a reply goes out."""
