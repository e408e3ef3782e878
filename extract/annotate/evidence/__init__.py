"""What a clip itself shows and says: action units, the peak frame, its picture and sound, its words."""
