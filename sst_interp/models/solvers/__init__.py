"""models/solvers"""
