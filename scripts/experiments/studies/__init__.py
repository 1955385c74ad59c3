"""Studies over many seeds: are the two frameworks equally accurate, and what does convolution gain?"""
