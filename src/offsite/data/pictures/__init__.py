"""Data sets of pictures: their files, their classes, and the arrays that an encoder reads."""
