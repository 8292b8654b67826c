"""Nodes of the graph, part by part: decoder, attention, embedding, linear layers."""
