"""What each device is told to do in a round."""
