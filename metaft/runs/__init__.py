"""What a run is on the disk, and how it comes about, goes on and ends."""
