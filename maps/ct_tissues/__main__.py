"""`python maps/ct_tissues -i INPUT -o OUTPUT -m MODELS`."""

from app import CTTissuesApp

if __name__ == "__main__":
    CTTissuesApp().run()
