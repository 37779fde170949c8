"""The separation laboratory: does a method draw every concept, on its own shape, without mixing?"""
