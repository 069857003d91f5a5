_base_ = './_base_/bccd.py'
