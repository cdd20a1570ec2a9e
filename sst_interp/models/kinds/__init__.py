"""models/kinds"""
