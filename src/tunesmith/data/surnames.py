"""Common surnames of the United States, for the parties of made-up cases in tasks.py."""

from __future__ import annotations

_TEXT = """
    Abbott Acosta Adams Adler Aguilar Alexander Allen Alvarez Anderson Andrews Armstrong Arnold Atkins Austin Bailey
    Baker Baldwin Ball Ballard Banks Barber Barker Barnes Barnett Barrett Barton Bates Beck Becker Bell Bennett Benson
    Berger Berry Bishop Black Blair Blake Bowen Bowman Boyd Bradley Brady Brennan Brewer Briggs Brooks Brown Bryant
    Buchanan Burgess Burke Burns Burton Bush Butler Byrd Caldwell Campbell Cannon Carlson Carpenter Carr Carroll
    Carter Castillo Castro Chambers Chandler Chang Chapman Chavez Chen Christensen Clark Clarke Clayton Cohen Cole
    Coleman Collins Contreras Cook Cooper Cox Craig Crawford Cruz Cummings Cunningham Curtis Daniels Davidson Davis
    Dawson Day Dean Delgado Dennis Diaz Dixon Doyle Drake Duncan Dunn Edwards Elliott Ellis Erickson Espinoza Estrada
    Evans Farrell Ferguson Fernandez Fields Fischer Fisher Fitzgerald Fleming Fletcher Flores Flynn Ford Foster Fowler
    Fox Francis Frank Franklin Freeman Fuller Garcia Gardner Garrett Gibson Gilbert Gomez Gonzales Goodman Gordon
    Graham Grant Graves Gray Green Greene Gregory Griffin Griffith Guerrero Gutierrez Guzman Hale Hall Hamilton Hansen
    Hanson Hardy Harper Harris Harrison Hart Harvey Hawkins Hayes Henderson Henry Hernandez Herrera Hicks Higgins Hill
    Hoffman Holland Holmes Holt Hopkins Horton Howard Howell Hudson Hughes Hunt Hunter Ingram Jackson Jacobs James
    Jenkins Jennings Jensen Jimenez Johnson Johnston Jones Jordan Joseph Keller Kelley Kelly Kennedy Kim King Klein
    Knight Lambert Lane Larson Lawrence Lawson Lee Leonard Lewis Lindsey Little Logan Long Lopez Love Lowe Lucas Lynch
    Lyons Maldonado Mann Manning Marks Marquez Marsh Marshall Martin Martinez Mason Matthews McCarthy McCoy McDonald
    McKinney Medina Mejia Mendez Mendoza Meyer Miller Mills Mitchell Montgomery Moore Morales Moreno Morgan Morris
    Morrison Moss Mueller Munoz Murphy Murray Myers Navarro Neal Nelson Newman Newton Nguyen Nichols Norman Norris
    Novak Nunez Obrien Oliver Olson Ortega Ortiz Owens Padilla Palmer Park Parker Patel Patterson Payne Pearson Pena
    Perez Perkins Perry Peters Peterson Phillips Pierce Porter Potter Powell Price Quinn Ramirez Ramos Ramsey Reed
    Reese Reeves Reyes Reynolds Rhodes Rice Richards Riley Rivera Roberts Robinson Rodriguez Rogers Romero Rosales
    Rosen Ross Rowe Roy Ruiz Russell Ryan Salazar Sanchez Sanders Sandoval Santos Schmidt Schneider Schroeder Schultz
    Schwartz Scott Shannon Shaw Sherman Silva Simmons Simpson Sims Singh Smith Snyder Soto Spencer Stanley Steele
    Stephens Stevens Stewart Stone Sullivan Sutton Swanson Taylor Terry Thomas Thompson Thornton Torres Townsend Tran
    Tucker Turner Tyler Valdez Vargas Vasquez Vaughn Vega Wade Wagner Walker Wallace Walsh Walters Walton Ward Warner
    Warren Washburn Watkins Watson Watts Weaver Webb Weber Weiss Welch Wells West Wheeler White Williams Williamson
    Wilson Wolfe Wong Wood Woods Wright Wu Yang Young Zhang Zimmerman
"""

SURNAMES: tuple[str, ...] = tuple(_TEXT.split())
