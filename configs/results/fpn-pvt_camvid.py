_base_ = './_base_/camvid.py'
