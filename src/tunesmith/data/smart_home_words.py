"""Word lists of the smart home data set: what people call their rooms, devices, lists and timers.

The intent templates leave these to the house, so they are ours. Each language maps a kind to two strings of names
separated by ", ": the first is for training, the second is held out for dev and test; no name is in both. A kind is an
entity domain ("light": names for `{name}` where the template wants a light), or the name of an open list ("area",
"timer_name", ...).

Two rules keep a sentence from having two readings. A name never ends in the noun that its templates may add ("lamp",
"floor", "list", "timer"), because "the reading lamp" would then be both a lamp called "reading" and a "reading lamp".
And a device is never "<room> <kind of device>", because "kitchen light" is the lights of an area, not a name.
"""

from __future__ import annotations

Kinds = dict[str, tuple[str, str]]

_ENGLISH: Kinds = {
    "area": (
        "kitchen, bedroom, living room, bathroom, garage, office, hallway, dining room, laundry room, attic, "
        "nursery, guest room, master bedroom, kids' room, Emma's room, Dad's office, game room, home theater, "
        "library, playroom, patio, porch, backyard, front yard, greenhouse, workshop, shed, mudroom, foyer, "
        "family room, wine cellar, home gym, music room, sunroom, conservatory, utility room, ensuite, closet, "
        "spare room, breakfast nook, driveway, balcony, grandma's bedroom, study, boiler room, Ben's bathroom",
        "pantry, den, lounge, terrace, veranda, cloakroom, craft room, sewing room, Olivia's bedroom, "
        "grandpa's workshop, server room, carport, sauna, reading corner, guest bathroom, twins' room",
    ),
    "floor": (
        "ground, first, second, upper, lower, basement, upstairs, downstairs, mezzanine, penthouse, main, "
        "bottom, middle, entrance level, sleeping level, parents' level",
        "top, third, fourth, garden level, underground, street level, tenants' level",
    ),
    "light": (
        "chandelier, aquarium, Christmas tree, bedside, ceiling, Anna's desk, vanity mirror, fireplace mantel, "
        "bookshelf, sconce, LED strip, TV backlight, piano, wardrobe, star projector, pendant, picture frame, "
        "globe, Noah's moon, vintage lantern, Hue Go, Lily's unicorn, torchiere, plant shelf",
        "nightstand, salt crystal, Oliver's rocket, sideboard, uplighter, curio, floating cloud, neon sign, "
        "snow globe, record shelf",
    ),
    "switch": (
        "coffee maker, kettle, dishwasher, washing machine, dryer, water heater, toaster, iron, printer, "
        "Tom's computer, pool pump, heated towel rail, electric blanket, dehumidifier, fish tank filter, "
        "garden fountain, phone charger, sump pump, slow cooker, bug zapper",
        "espresso machine, rice cooker, router, sewing machine, Mia's gaming PC, egg incubator, bike charger, "
        "popcorn maker, humidifier",
    ),
    "input_boolean": (
        "guest mode, vacation mode, away mode, night mode, holiday mode, do not disturb, baby mode, quiet hours, "
        "eco mode, Lena's work mode, winter mode, party mode, security mode, alarm bypass",
        "visitor mode, travel mode, sleep mode, summer mode, pet mode, Carl's study mode, silent mode",
    ),
    "fan": (
        "ceiling fan, tower fan, desk fan, exhaust fan, Dyson, extractor hood, box fan, air purifier, "
        "pedestal fan, Jack's fan, ventilator, window fan, range hood, turbo fan",
        "standing fan, air circulator, cooker hood, oscillating fan, Ella's fan, ventilation system, bladeless fan",
    ),
    "media_player": (
        "TV, Sonos, Apple TV, soundbar, Chromecast, record player, HomePod, Roku, Xbox, Sam's speaker, stereo, "
        "Echo Dot, projector, radio, smart display, big screen, Fire TV, Nest Hub, surround system, jukebox",
        "Google Home, PlayStation, Lucy's tablet, boombox, Bose speaker, Denon receiver, television, turntable",
    ),
    "climate": (
        "thermostat, heat pump, air conditioner, Nest, radiator, underfloor heating, mini split, AC, Ecobee, "
        "central heating, space heater, Leo's radiator, furnace, swamp cooler",
        "pellet stove, air con, Tado, wall unit, electric heater, Nina's heater, convector",
    ),
    "cover": (
        "Velux, roller shutter, blackout curtain, venetian blind, main gate, sun sail, projector screen, "
        "skylight, pergola roof, Zoe's curtain, bay window, French door, barn door, roman shade, drapes, "
        "louvers, hurricane shutter, pool cover",
        "rolling gate, honeycomb blind, motorized shade, canopy, Max's blind, pet flap, sheer curtain, sliding door",
    ),
    "valve": (
        "water main, sprinkler, garden hose, irrigation valve, gas valve, drip line, main valve, pond fill, "
        "hot water valve, shutoff valve, radiator valve, Rosa's sprinkler, rain barrel, pool valve",
        "lawn sprinkler, stopcock, greywater valve, orchard irrigation, ball valve, Hugo's hose, hydrant",
    ),
    "lock": (
        "front door, back door, side door, deadbolt, front gate, garden gate, safe, cellar door, Yale lock, "
        "August lock, medicine cabinet, bike locker, mailbox, Mike's locker, smart lock, wine fridge",
        "entrance door, storm door, tool chest, padlock, Nuki, liquor cabinet, Eva's drawer, service entrance",
    ),
    "binary_sensor": (
        "motion sensor, window contact, door contact, smoke detector, presence sensor, leak sensor, "
        "mailbox sensor, fridge door sensor, occupancy sensor, vibration sensor, glass break sensor, "
        "Luna's crib sensor, skylight sensor, doormat sensor",
        "motion detector, flood detector, bed sensor, freezer contact, gate contact, Theo's chair sensor, radar sensor",
    ),
    "sensor": (
        "humidity, power usage, air quality, CO2 level, battery level, solar production, water consumption, "
        "rain gauge, wind speed, UV index, energy meter, Ivy's plant moisture, pollen count, barometer, "
        "noise level, fuel tank",
        "electricity meter, gas consumption, dew point, soil moisture, oil level, Finn's step count, "
        "radon level, water pressure",
    ),
    "person": (
        "Anna, Ben, Maria, Mom, Dad, Grandma, Uncle Joe, James, Sophia, Liam, Aunt Carol, Chloe, Paul, Priya, "
        "Kenji, Mary Ann, nanny, Tom's brother, Yusuf, Elena",
        "Charlotte, Grandpa, Aunt Rita, Marcus, Fatima, Hans, Isabella, babysitter, Wei, Nick's sister",
    ),
    "scene": (
        "movie night, dinner party, good morning, bedtime, romantic evening, focus, relax, sunrise, party, "
        "reading time, game day, Friday night, deep sleep, Amy's birthday, cozy evening, Halloween, yoga, "
        "candlelight",
        "date night, sunset, film evening, concentration, brunch, wind down, Jake's party, tropical beach",
    ),
    "script": (
        "good night routine, morning routine, leaving home, water the plants, feed the cat, arm the alarm, "
        "coming home, open house, welcome sequence, lock up, Monday checklist, wake up call, "
        "Nora's homework reminder, panic mode",
        "evening routine, laundry reminder, vacation shutdown, storm preparation, doorbell announcement, "
        "Peter's alarm clock, school run, night watch",
    ),
    "button": (
        "doorbell, restart, reset, identify, reboot modem, panic, start shower, dispense food, open trunk, "
        "call elevator, ring chime, flush, Sara's pager, emergency stop",
        "self test, reload, snooze, wake computer, intercom, calibrate, Otto's feeder",
    ),
    "todo": (
        "groceries, packing, chores, holiday ideas, weekend, gift, hardware store, work, Emily's wish, homework, "
        "camping, bucket, Christmas, garden tasks, party planning, pharmacy",
        "errands, travel, tidying, anniversary, DIY, David's errand, moving, pet supplies",
    ),
    "weather": (
        "London, Berlin, New York, Paris, Tokyo, Chicago, Sydney, Toronto, San Francisco, Madrid, Rome, "
        "Cape Town, Dublin, Seattle, Salt Lake City, Oslo",
        "Boston, Lisbon, Buenos Aires, Vienna, Denver, Kuala Lumpur, Helsinki, Los Angeles",
    ),
    "vacuum": (
        "roomba, robot vacuum, vacuum cleaner, Roborock, sweeper, robovac, hoover, mop robot, Deebot, "
        "Oscar's vacuum, cleaning robot, Eufy, dust bot, big vacuum",
        "vacuum robot, Dreame, floor cleaner, carpet sweeper, mopping bot, Hazel's robovac, Neato",
    ),
    "lawn_mower": (
        "Husqvarna, grass cutter, lawn robot, Automower, mowbot, Gardena, Worx, turf trimmer, lawn bot, "
        "Landroid, grass robot, Bill's lawn robot, hedgehog, green robot",
        "grass muncher, Robomow, meadow bot, lawn trimmer, Mammotion, Gus's grass cutter, turf robot",
    ),
    "message": (
        "dinner is ready, the taxi is here, we are leaving now, time for bed, someone is at the door, "
        "the movie starts soon, please come downstairs, lunch is served, it's snowing, grandma has arrived, "
        "I need some help, don't forget your keys, the game is starting, wash your hands, the pizza arrived, "
        "the school bus comes at eight, we have visitors, put your shoes away, breakfast, "
        "the meeting begins soon, happy birthday Emma, I'm home, everyone be quiet, the cake is done",
        "supper is on the table, the plumber is here, get ready for school, everybody into the car, "
        "the baby is asleep, it's raining outside, dessert time, clean up your toys, the show begins shortly, "
        "Uncle Ray is on the phone",
    ),
    "search_query": (
        "jazz, Taylor Swift, Abbey Road, classical piano, Bohemian Rhapsody, Daft Punk, lo-fi beats, "
        "The Beatles, Thriller, Miles Davis, Harry Potter, Radiohead, white noise, Frozen, "
        "Dark Side of the Moon, eighties rock, Stairway to Heaven, Adele, Serial, Stranger Things, "
        "Country Roads, The Daily",
        "Pink Floyd, smooth saxophone, Purple Rain, Mozart, Billie Eilish, road trip mix, Imagine, Breaking Bad, "
        "ocean sounds, Bob Marley, Game of Thrones",
    ),
    "zone": (
        "home, work, school, gym, soccer practice, church, university, Grandma's house, hospital, airport, "
        "train station, summer house, daycare, yoga studio, swimming pool, mall",
        "college, beach, music lessons, Tim's place, supermarket, coffee shop, lake house, clinic",
    ),
    "timer_name": (
        "pizza, pasta, tea, eggs, laundry, bread, homework, cookies, baked potatoes, nap, rice, chicken, "
        "workout, roast beef, piano practice, screen time, sourdough, time out, Kate's cake, oven",
        "lasagna, brisket, power nap, muffins, hair dye, soup, Owen's bath, stretching, steak",
    ),
    "timer_command": (
        "turn off the lights, open the garage door, turn on the TV, close the curtains, lock the front door, "
        "start the dishwasher, play some music, turn off the heater, water the plants, set the lights to red, "
        "stop the music, turn down the volume, turn off everything, pause the movie, start the coffee maker, "
        "unlock the back door",
        "switch off the oven, raise the blinds, turn on the sprinklers, dim the bedroom lights, "
        "mute the speakers, shut the windows, turn off the kettle, lower the thermostat, "
        "start the washing machine",
    ),
    "shopping_list_item": (
        "milk, eggs, bread, butter, bananas, olive oil, toilet paper, orange juice, ground coffee, "
        "chicken breast, dish soap, AA batteries, cheddar cheese, tomatoes, rice, a dozen eggs, peanut butter, "
        "dog food, paper towels, two avocados, Ben's cereal, frozen peas, black pepper, sparkling water",
        "oat milk, yogurt, maple syrup, laundry detergent, brown sugar, salmon fillets, light bulbs, "
        "three lemons, Clara's shampoo, spinach, cat litter",
    ),
    "todo_list_item": (
        "call the dentist, pay the rent, pick up the dry cleaning, sunscreen, book flights, renew the passport, "
        "water bottles, email the landlord, fix the bike, candles, wrap the presents, mow the lawn, "
        "order new filters, Jim's medicine, passport photos, change the sheets, screws, tent pegs, "
        "write the report, buy stamps",
        "call the plumber, file the taxes, hiking boots, return the library books, sleeping bag, "
        "clean the gutters, Sophie's present, update the resume, bandages, schedule a haircut",
    ),
}

_GERMAN: Kinds = {
    "area": (
        "Küche, Schlafzimmer, Wohnzimmer, Bad, Garage, Büro, Flur, Esszimmer, Waschküche, Kinderzimmer, "
        "Gästezimmer, Arbeitszimmer, Terrasse, Balkon, Garten, Annas Zimmer, Papas Büro, Hobbyraum, "
        "Wintergarten, kleines Bad",
        "Abstellkammer, Diele, Werkstatt, Gästebad, Veranda, Speisekammer, Lenas Zimmer, Bibliothek",
    ),
    "floor": (
        "Erdgeschoss, Obergeschoss, Keller, Dachgeschoss, erster Stock, zweiter Stock, Untergeschoss, oben, "
        "unten, Zwischengeschoss, Galerie, Hochparterre",
        "dritter Stock, vierter Stock, Souterrain, Tiefgeschoss, Spitzboden, oberste Etage",
    ),
    "light": (
        "Kronleuchter, Stehleuchte, Aquarium, Weihnachtsbaum, Annas Schreibtisch, Spiegelschrank, LED-Streifen, "
        "Bücherregal, Pendelleuchte, Lichterkette, Nachttisch, Klavier, Mond, Deckenfluter",
        "Sternprojektor, Vitrine, Jonas' Rakete, Salzkristall, Anrichte, Leuchtkugel",
    ),
    "switch": (
        "Kaffeemaschine, Wasserkocher, Spülmaschine, Waschmaschine, Trockner, Toaster, Bügeleisen, Drucker, "
        "Toms Computer, Poolpumpe, Heizdecke, Luftentfeuchter, Springbrunnen, Ladegerät",
        "Espressomaschine, Reiskocher, Nähmaschine, Mias Spielkonsole, Teichpumpe, Handtuchwärmer",
    ),
    "input_boolean": (
        "Gästemodus, Urlaubsmodus, Nachtmodus, Abwesenheit, Partymodus, Ruhezeit, Sparmodus, Kindersicherung, "
        "Lenas Arbeitsmodus, Wintermodus, Alarmsperre, Anwesenheitssimulation",
        "Besuchsmodus, Reisemodus, Schlafmodus, Sommermodus, Karls Lernmodus, Putzmodus",
    ),
    "fan": (
        "Deckenventilator, Turmventilator, Tischventilator, Abluft, Dyson, Dunstabzug, Bodenventilator, "
        "Luftreiniger, Jans Ventilator, Badlüfter, Lüftungsanlage, Umluftgebläse",
        "Standventilator, Luftumwälzer, Abzugshaube, Ellas Ventilator, Wandlüfter, Windmaschine",
    ),
    "media_player": (
        "Fernseher, Sonos, Apple TV, Soundbar, Plattenspieler, Küchenradio, Xbox, Toms Lautsprecher, "
        "Stereoanlage, Echo Dot, Beamer, Chromecast, große Leinwand, Heimkino",
        "Google Home, PlayStation, Lucys Tablet, Radiowecker, Bose Box, Receiver",
    ),
    "climate": (
        "Thermostat, Wärmepumpe, Klimagerät, Heizkörper, Fußbodenheizung, Zentralheizung, Tado, Leos Heizung, "
        "Kachelofen, Heizlüfter, Splitgerät, Nachtspeicher",
        "Gasheizung, Konvektor, Wandheizung, Ninas Heizkörper, Ölradiator, Infrarotheizung",
    ),
    "cover": (
        "Velux, Raffstore, Verdunkelung, Hoftor, Sonnensegel, Leinwand, Dachfenster, Zoes Vorhang, Lamellendach, "
        "Schiebetür, Plissee, Poolabdeckung, linkes Rollo",
        "Rolltor, Faltrollo, Vordach, Max' Rollo, Katzenklappe, Gardine",
    ),
    "valve": (
        "Hauptwasserhahn, Rasensprenger, Gartenschlauch, Gasventil, Tropfleitung, Hauptventil, Teichzulauf, "
        "Warmwasserventil, Absperrhahn, Rosas Sprenger, Regentonne, Heizungsventil",
        "Bewässerung, Kugelhahn, Hydrant, Hugos Schlauch, Mischventil, Zisterne",
    ),
    "lock": (
        "Haustür, Hintertür, Seitentür, Gartentor, Tresor, Kellertür, Nuki, Medizinschrank, Fahrradkeller, "
        "Briefkasten, Mikes Spind, Türschloss",
        "Eingangstür, Werkzeugkiste, Vorhängeschloss, Weinschrank, Evas Schublade, Nebeneingang",
    ),
    "binary_sensor": (
        "Bewegungsmelder, Fensterkontakt, Türkontakt, Rauchmelder, Präsenzmelder, Wassermelder, "
        "Briefkastensensor, Kühlschranksensor, Glasbruchmelder, Lunas Bettsensor, Vibrationssensor, Mattensensor",
        "Radarsensor, Flutsensor, Gefrierschrankkontakt, Torkontakt, Theos Stuhlsensor, Lukenkontakt",
    ),
    "sensor": (
        "Luftfeuchtigkeit, Stromverbrauch, Luftqualität, Solarertrag, Wasserverbrauch, Regenmesser, "
        "Windgeschwindigkeit, Stromzähler, Ivys Bodenfeuchte, Barometer, Batteriestand, Tankfüllung",
        "Gasverbrauch, Taupunkt, Füllstand, Finns Schrittzähler, Wasserdruck, Pollenflug",
    ),
    "person": (
        "Anna, Ben, Maria, Mama, Papa, Oma, Onkel Joachim, Jakob, Sophia, Paul, Tante Karin, Yusuf, Annalena, Felix",
        "Charlotte, Opa, Tante Rita, Markus, Fatima, Onkel Heinz",
    ),
    "scene": (
        "Filmabend, Abendessen, Guten Morgen, Gute Nacht, Romantik, Konzentration, Entspannung, Sonnenaufgang, "
        "Party, Lesezeit, Amys Geburtstag, Spieleabend",
        "Kinoabend, Sonnenuntergang, Brunch, Feierabend, Jakobs Party, Strandurlaub",
    ),
    "script": (
        "Gute-Nacht-Routine, Morgenroutine, Haus verlassen, Pflanzen gießen, Katze füttern, "
        "Alarm scharf schalten, Nach Hause kommen, Willkommensgruß, Alles absperren, Montagscheck, Weckruf, "
        "Noras Hausaufgaben",
        "Abendroutine, Wäsche-Erinnerung, Urlaubsabschaltung, Sturmvorbereitung, Peters Wecker, Nachtwache",
    ),
    "button": (
        "Türklingel, Neustart, Zurücksetzen, Identifizieren, Modem neu starten, Panik, Dusche starten, "
        "Futter ausgeben, Kofferraum öffnen, Aufzug rufen, Gong, Saras Pieper",
        "Selbsttest, Schlummern, Computer wecken, Gegensprechanlage, Kalibrieren, Ottos Futterspender",
    ),
    "todo": (
        "Einkäufe, Urlaub, Haushalt, Geschenke, Wochenende, Baumarkt, Arbeit, Emilys Wünsche, Hausaufgaben, "
        "Camping, Weihnachten, Apotheke",
        "Erledigungen, Reise, Putzen, Geburtstag, Davids Aufgaben, Umzug",
    ),
    "weather": (
        "Berlin, Hamburg, München, Köln, Wien, Zürich, New York, Paris, Bad Homburg, Frankfurt, Leipzig, Kiel",
        "Bremen, Salzburg, Buenos Aires, Dresden, Stuttgart, Los Angeles",
    ),
    "vacuum": (
        "Roomba, Saugroboter, Staubsauger, Roborock, Wischroboter, Robbi, Putzteufel, Deebot, Oskars Sauger, "
        "Reinigungsroboter, großer Sauger, Krümelmonster",
        "Dreame, Bodenreiniger, Teppichkehrer, Staubfresser, Hannas Saugroboter, Neato",
    ),
    "lawn_mower": (
        "Husqvarna, Mähroboter, Rasenroboter, Automower, Gardena, Worx, Grasfresser, Landroid, Shaun, "
        "Bills Mäher, Igel, grüner Roboter",
        "Robomow, Wiesenbot, Rasentrimmer, Mammotion, Gustavs Mäher, Halmkürzer",
    ),
    "message": (
        "das Essen ist fertig, das Taxi ist da, wir gehen jetzt los, Zeit fürs Bett, jemand ist an der Tür, "
        "der Film beginnt gleich, bitte kommt runter, es schneit, Oma ist angekommen, ich brauche Hilfe, "
        "vergesst eure Schlüssel nicht, wascht euch die Hände, alles Gute Emma, die Pizza ist da",
        "das Abendbrot steht bereit, der Klempner ist da, macht euch fertig, das Baby schläft, "
        "es regnet draußen, räumt eure Spielsachen auf",
    ),
    "search_query": (
        "Jazz, Taylor Swift, Abbey Road, klassische Musik, Bohemian Rhapsody, Rammstein, Die Ärzte, "
        "Herbert Grönemeyer, Miles Davis, Harry Potter, Weißes Rauschen, Die drei Fragezeichen, Helene Fischer, "
        "Tatort",
        "Pink Floyd, Purple Rain, Mozart, Nena, Meeresrauschen, Die Toten Hosen",
    ),
    "zone": (
        "Zuhause, Arbeitsplatz, Schule, Fitnessstudio, Fußballtraining, Kirche, Universität, Omas Haus, "
        "Krankenhaus, Flughafen, Bahnhof, Ferienhaus",
        "Hochschule, Strand, Musikunterricht, Timos Wohnung, Supermarkt, Praxis",
    ),
    "timer_name": (
        "Pizza, Nudeln, Tee, Eier, Wäsche, Brot, Kekse, Ofenkartoffeln, Mittagsschlaf, Reis, Hähnchen, "
        "Klavier üben, Auszeit, Katrins Kuchen",
        "Lasagne, Schweinebraten, Nickerchen, Muffins, Suppe, Olivers Bad",
    ),
    "timer_command": (
        "schalte das Licht aus, öffne die Garage, schalte den Fernseher ein, schließe die Vorhänge, "
        "sperr die Haustür ab, starte die Spülmaschine, spiele Musik, schalte die Heizung aus, "
        "gieße die Pflanzen, stoppe die Musik, mach alles aus, mach die Musik leiser",
        "schalte den Ofen aus, fahre die Rollläden hoch, starte den Rasensprenger, dimme das Licht, "
        "schließe die Fenster, starte die Waschmaschine",
    ),
    "shopping_list_item": (
        "Milch, Eier, Brot, Butter, Bananen, Olivenöl, Toilettenpapier, Orangensaft, gemahlener Kaffee, "
        "Spülmittel, Batterien, Tomaten, Reis, zwei Gurken, Bens Müsli, Mineralwasser",
        "Hafermilch, Joghurt, Ahornsirup, Waschmittel, drei Zitronen, Claras Shampoo, Spinat",
    ),
    "todo_list_item": (
        "Zahnarzt anrufen, Miete zahlen, Reinigung abholen, Sonnencreme, Flüge buchen, Pass verlängern, "
        "Fahrrad reparieren, Kerzen, Geschenke einpacken, Rasen mähen, Jims Medikamente, Bettwäsche wechseln, "
        "Schrauben, Briefmarken kaufen",
        "Steuererklärung machen, Wanderschuhe, Bücher zurückgeben, Schlafsack, Dachrinne säubern, Sophies Geschenk",
    ),
}

_FRENCH: Kinds = {
    "area": (
        "cuisine, chambre, salon, salle de bain, garage, bureau, couloir, salle à manger, buanderie, grenier, "
        "chambre d'amis, chambre parentale, terrasse, balcon, jardin, chambre de Léa, salle de jeux, "
        "bibliothèque, atelier, véranda",
        "cellier, vestibule, chambre de Louis, mezzanine, dressing, salle de musique, serre, séjour",
    ),
    "floor": (
        "rez-de-chaussée, premier, deuxième, sous-sol, étage du haut, étage du bas, entresol, dernier, "
        "niveau principal, niveau bas, demi-palier, étage des enfants",
        "troisième, quatrième, rez-de-jardin, étage supérieur, niveau des parents, combles",
    ),
    "light": (
        "lustre, lampadaire, aquarium, sapin de Noël, bureau d'Anna, miroir, bande LED, étagère, suspension, "
        "guirlande, table de nuit, applique, plafonnier, piano",
        "projecteur d'étoiles, vitrine, fusée de Jules, buffet, spot, globe lunaire",
    ),
    "switch": (
        "cafetière, bouilloire, lave-vaisselle, lave-linge, sèche-linge, grille-pain, fer à repasser, "
        "imprimante, ordinateur de Tom, pompe de piscine, couverture chauffante, déshumidificateur, fontaine, "
        "chargeur",
        "machine à expresso, cuiseur à riz, machine à coudre, console de Mia, pompe du bassin, sèche-serviettes",
    ),
    "input_boolean": (
        "mode invité, mode vacances, mode nuit, mode absence, mode fête, heures calmes, mode éco, mode bébé, "
        "mode travail de Léna, mode hiver, mode sécurité, ne pas déranger",
        "mode visiteur, mode voyage, mode sommeil, mode été, mode étude de Karl, mode silencieux",
    ),
    "fan": (
        "ventilateur de plafond, ventilateur colonne, ventilateur de table, extracteur, Dyson, hotte, "
        "purificateur d'air, ventilateur de Jacques, VMC, brasseur d'air, turbine, aérateur",
        "ventilateur sur pied, circulateur d'air, hotte aspirante, ventilateur d'Ella, aération, soufflerie",
    ),
    "media_player": (
        "télé, Sonos, Apple TV, barre de son, platine vinyle, Chromecast, Xbox, enceinte de Sam, chaîne hifi, "
        "Echo Dot, projecteur, radio, grand écran, home cinéma",
        "Google Home, PlayStation, tablette de Lucie, radio-réveil, enceinte Bose, téléviseur",
    ),
    "climate": (
        "thermostat, pompe à chaleur, climatiseur, radiateur, plancher chauffant, chauffage central, Netatmo, "
        "radiateur de Léo, poêle, convecteur, clim réversible, chaudière",
        "Tado, chauffage d'appoint, radiateur bain d'huile, radiateur de Nina, chauffage au gaz, panneau rayonnant",
    ),
    "cover": (
        "Velux, brise-soleil, rideau occultant, portail principal, voile d'ombrage, écran de projection, "
        "lucarne, rideau de Zoé, pergola, baie vitrée, rideau métallique, bâche de piscine",
        "porte coulissante, canisse, auvent, store de Max, chatière, voilage",
    ),
    "valve": (
        "arrivée d'eau, arroseur, tuyau de jardin, vanne de gaz, goutte-à-goutte, vanne principale, "
        "remplissage du bassin, vanne d'eau chaude, robinet d'arrêt, arroseur de Rosa, récupérateur d'eau, "
        "vanne du radiateur",
        "arrosage, vanne à bille, borne d'incendie, tuyau d'Hugo, vanne mélangeuse, citerne",
    ),
    "lock": (
        "porte d'entrée, porte arrière, porte latérale, portillon, coffre-fort, porte de la cave, Nuki, "
        "armoire à pharmacie, local à vélos, boîte aux lettres, casier de Mike, serrure connectée",
        "porte principale, coffre à outils, cadenas, cave à vin, tiroir d'Eva, entrée de service",
    ),
    "binary_sensor": (
        "détecteur de mouvement, capteur de fenêtre, capteur de porte, détecteur de fumée, "
        "détecteur de présence, détecteur de fuite, capteur du frigo, capteur de vibration, "
        "capteur du lit de Luna, capteur du paillasson, détecteur de bris de vitre, capteur de la boîte",
        "capteur radar, détecteur d'inondation, capteur du congélateur, capteur du portail, "
        "capteur du fauteuil de Théo, capteur de trappe",
    ),
    "sensor": (
        "humidité, consommation électrique, qualité de l'air, production solaire, consommation d'eau, "
        "pluviomètre, vitesse du vent, compteur d'énergie, plante d'Ivy, baromètre, niveau de batterie, "
        "niveau sonore",
        "consommation de gaz, point de rosée, niveau de fioul, podomètre de Finn, pression d'eau, taux de pollen",
    ),
    "person": (
        "Anna, Benoît, Marie, Maman, Papa, Mamie, Oncle Jean, Jacques, Sophie, Paul, Tante Carole, Youssef, "
        "Jean-Pierre, Élodie",
        "Charlotte, Papi, Tante Rita, Marc, Fatima, Oncle Henri",
    ),
    "scene": (
        "soirée cinéma, dîner, bonjour, bonne nuit, soirée romantique, concentration, détente, lever du soleil, "
        "fête, lecture, anniversaire d'Amy, soirée jeux",
        "soirée film, coucher du soleil, brunch, fin de journée, fête de Jules, plage tropicale",
    ),
    "script": (
        "routine du soir, routine du matin, départ de la maison, arroser les plantes, nourrir le chat, "
        "activer l'alarme, retour à la maison, accueil, tout verrouiller, liste du lundi, appel du réveil, "
        "devoirs de Nora",
        "routine du coucher, rappel de lessive, fermeture de vacances, préparation tempête, réveil de Pierre, "
        "ronde de nuit",
    ),
    "button": (
        "sonnette, redémarrage, réinitialisation, identification, relance du modem, panique, "
        "démarrage de la douche, distribution de croquettes, ouverture du coffre, appel de l'ascenseur, "
        "carillon, bip de Sara",
        "autotest, répétition, réveil de l'ordinateur, interphone, calibrage, distributeur d'Otto",
    ),
    "todo": (
        "courses, valise, ménage, cadeaux, week-end, bricolage, travail, souhaits d'Émilie, devoirs, camping, "
        "Noël, pharmacie",
        "commissions, voyage, nettoyage, anniversaire, tâches de David, déménagement",
    ),
    "weather": (
        "Paris, Lyon, Marseille, Toulouse, Nice, Bruxelles, New York, Berlin, Aix-en-Provence, Genève, Montréal, Brest",
        "Nantes, Bordeaux, Buenos Aires, Strasbourg, Lille, Los Angeles",
    ),
    "vacuum": (
        "Roomba, robot aspirateur, aspirateur, Roborock, robot laveur, Robi, balayeuse, Deebot, "
        "aspirateur d'Oscar, robot de ménage, gros aspirateur, mange-poussière",
        "aspirobot, Dreame, laveur de sol, balai robot, aspirateur d'Agathe, Neato",
    ),
    "lawn_mower": (
        "Husqvarna, robot tondeuse, Automower, Gardena, Worx, Landroid, coupe-herbe, robot de pelouse, Shaun, "
        "tondeuse de Bill, hérisson, robot vert",
        "Robomow, brouteur, tondeuse à gazon, Mammotion, tondeuse de Gus, robot du pré",
    ),
    "message": (
        "le dîner est prêt, le taxi est là, on part maintenant, c'est l'heure du lit, quelqu'un est à la porte, "
        "le film commence bientôt, venez en bas, il neige, mamie est arrivée, j'ai besoin d'aide, "
        "n'oubliez pas vos clés, lavez-vous les mains, bon anniversaire Emma, la pizza est arrivée",
        "le souper est servi, le plombier est là, préparez-vous pour l'école, le bébé dort, il pleut dehors, "
        "rangez vos jouets",
    ),
    "search_query": (
        "du jazz, Taylor Swift, Abbey Road, musique classique, Bohemian Rhapsody, Daft Punk, Édith Piaf, "
        "Stromae, Miles Davis, Harry Potter, bruit blanc, Jacques Brel, Indochine, Les Choristes",
        "Pink Floyd, Purple Rain, Mozart, Céline Dion, bruit des vagues, Serge Gainsbourg",
    ),
    "zone": (
        "maison, lieu de travail, école, salle de sport, entraînement de foot, église, université, "
        "maison de mamie, hôpital, aéroport, gare, maison de campagne",
        "faculté, plage, cours de musique, appartement de Tim, supermarché, clinique",
    ),
    "timer_name": (
        "pizza, pâtes, thé, œufs, lessive, pain, biscuits, pommes de terre, sieste, riz, poulet, cours de piano, "
        "pause écran, gâteau de Catherine",
        "lasagnes, rôti de porc, petite sieste, muffins, soupe, bain d'Olivier",
    ),
    "timer_command": (
        "éteins la lumière, ouvre le garage, allume la télé, ferme les rideaux, verrouille la porte d'entrée, "
        "lance le lave-vaisselle, mets de la musique, coupe le chauffage, arrose les plantes, arrête la musique, "
        "éteins tout, baisse le volume",
        "éteins le four, lève les stores, lance l'arrosage, tamise la lumière, ferme les fenêtres, "
        "lance la machine à laver",
    ),
    "shopping_list_item": (
        "lait, œufs, pain, beurre, bananes, huile d'olive, papier toilette, jus d'orange, café moulu, "
        "liquide vaisselle, piles, tomates, riz, deux avocats, céréales de Ben, eau gazeuse",
        "lait d'avoine, yaourts, sirop d'érable, trois citrons, shampoing de Clara, épinards, litière",
    ),
    "todo_list_item": (
        "appeler le dentiste, payer le loyer, passer au pressing, crème solaire, réserver les vols, "
        "renouveler le passeport, réparer le vélo, bougies, emballer les cadeaux, tondre la pelouse, "
        "médicaments de Jim, changer les draps, vis, acheter des timbres",
        "faire les impôts, chaussures de marche, rendre les livres, sac de couchage, nettoyer les gouttières, "
        "cadeau de Sophie",
    ),
}

_SPANISH: Kinds = {
    "area": (
        "cocina, dormitorio, salón, baño, garaje, oficina, pasillo, comedor, lavandería, desván, "
        "habitación de invitados, dormitorio principal, terraza, balcón, jardín, cuarto de Ana, sala de juegos, "
        "biblioteca, taller, porche",
        "despensa, vestíbulo, habitación de Luis, trastero, vestidor, invernadero, galería, aseo",
    ),
    "floor": (
        "planta baja, primera planta, segunda planta, sótano, planta de arriba, planta de abajo, entreplanta, "
        "ático, piso principal, piso bajo, semisótano, planta de los niños",
        "tercera planta, cuarta planta, buhardilla, piso superior, planta de los padres, azotea",
    ),
    "light": (
        "candelabro, acuario, árbol de Navidad, escritorio de Ana, espejo, tira LED, estantería, colgante, "
        "guirnalda, mesilla, aplique, plafón, piano, farol",
        "proyector de estrellas, vitrina, cohete de Julio, aparador, foco, globo lunar",
    ),
    "switch": (
        "cafetera, hervidor, lavavajillas, lavadora, secadora, tostadora, plancha, impresora, "
        "ordenador de Tomás, bomba de la piscina, manta eléctrica, deshumidificador, fuente, cargador",
        "máquina de espresso, arrocera, máquina de coser, consola de Mía, bomba del estanque, toallero eléctrico",
    ),
    "input_boolean": (
        "modo invitados, modo vacaciones, modo noche, modo ausente, modo fiesta, horas de silencio, modo ahorro, "
        "modo bebé, modo trabajo de Elena, modo invierno, modo seguridad, no molestar",
        "modo visita, modo viaje, modo sueño, modo verano, modo estudio de Carlos, modo silencioso",
    ),
    "fan": (
        "ventilador de techo, ventilador de torre, ventilador de mesa, extractor, Dyson, campana, "
        "purificador de aire, ventilador de Jaime, ventilación, turbina, aireador, renovador de aire",
        "ventilador de pie, circulador de aire, campana extractora, ventilador de Elsa, soplador, ventilador oscilante",
    ),
    "media_player": (
        "tele, Sonos, Apple TV, barra de sonido, tocadiscos, Chromecast, Xbox, altavoz de Sam, equipo de música, "
        "Echo Dot, proyector, radio, pantalla grande, cine en casa",
        "Google Home, PlayStation, tableta de Lucía, radiodespertador, altavoz Bose, televisor",
    ),
    "climate": (
        "termostato, bomba de calor, aire acondicionado, radiador, suelo radiante, calefacción central, Netatmo, "
        "radiador de Leo, estufa, convector, climatizador, caldera",
        "Tado, calefactor, split, radiador de Nina, calefacción de gas, panel radiante",
    ),
    "cover": (
        "Velux, estor enrollable, cortina opaca, portón principal, vela de sombra, pantalla de proyección, "
        "claraboya, cortina de Zoe, pérgola, puerta plegable, mosquitera, lona de la piscina",
        "puerta corredera, celosía, marquesina, estor de Max, gatera, visillo",
    ),
    "valve": (
        "llave general, aspersor, manguera, válvula de gas, riego por goteo, válvula principal, "
        "llenado del estanque, válvula de agua caliente, llave de paso, aspersor de Rosa, depósito de lluvia, "
        "válvula del radiador",
        "riego del césped, válvula de bola, hidrante, manguera de Hugo, válvula mezcladora, cisterna",
    ),
    "lock": (
        "puerta principal, puerta trasera, puerta lateral, cancela, caja fuerte, puerta de la bodega, Nuki, "
        "botiquín, cuarto de bicis, buzón, taquilla de Miguel, cerradura inteligente",
        "puerta de entrada, caja de herramientas, candado, vinoteca, cajón de Eva, entrada de servicio",
    ),
    "binary_sensor": (
        "sensor de movimiento, sensor de ventana, sensor de puerta, detector de humo, detector de presencia, "
        "detector de fugas, sensor de la nevera, sensor de vibración, sensor de la cuna de Luna, "
        "sensor del felpudo, detector de rotura, sensor del buzón",
        "detector de movimiento, detector de inundación, sensor del congelador, sensor del portón, "
        "sensor de la silla de Teo, sensor de radar",
    ),
    "sensor": (
        "humedad, consumo eléctrico, calidad del aire, producción solar, consumo de agua, pluviómetro, "
        "velocidad del viento, contador de energía, planta de Irene, barómetro, nivel de batería, nivel de ruido",
        "consumo de gas, punto de rocío, nivel de gasóleo, podómetro de Fernando, presión del agua, nivel de polen",
    ),
    "person": (
        "Ana, Benito, María, Mamá, Papá, Abuela, tío José, Jaime, Sofía, Pablo, tía Carmen, Yusuf, Juan Carlos, Elena",
        "Carlota, Abuelo, tía Rita, Marcos, Fátima, tío Enrique",
    ),
    "scene": (
        "noche de cine, cena, buenos días, buenas noches, noche romántica, concentración, relax, amanecer, "
        "fiesta, lectura, cumpleaños de Amelia, noche de juegos",
        "tarde de película, atardecer, almuerzo, fin del día, fiesta de Julio, playa tropical",
    ),
    "script": (
        "rutina de noche, rutina de mañana, salir de casa, regar las plantas, dar de comer al gato, "
        "armar la alarma, llegar a casa, bienvenida, cerrar todo, lista del lunes, despertador, deberes de Nora",
        "rutina de tarde, aviso de colada, cierre de vacaciones, preparar tormenta, alarma de Pedro, ronda nocturna",
    ),
    "button": (
        "timbre, reinicio, restablecer, identificar, reiniciar módem, pánico, iniciar ducha, dispensar pienso, "
        "abrir maletero, llamar ascensor, campanilla, aviso de Sara",
        "autodiagnóstico, posponer, despertar ordenador, interfono, calibrar, comedero de Otto",
    ),
    "todo": (
        "comestibles, equipaje, tareas, regalos, fin de semana, ferretería, trabajo, deseos de Emilia, deberes, "
        "acampada, Navidad, farmacia",
        "recados, viaje, limpieza, cumpleaños, pendientes de David, mudanza",
    ),
    "weather": (
        "Madrid, Barcelona, Sevilla, Valencia, Bilbao, Lima, Nueva York, Berlín, San Sebastián, Bogotá, "
        "Santiago, Cádiz",
        "Málaga, Zaragoza, Buenos Aires, Granada, Quito, Los Ángeles",
    ),
    "vacuum": (
        "Roomba, robot aspirador, aspiradora, Roborock, robot friegasuelos, Robi, barredora, Deebot, "
        "aspiradora de Óscar, robot de limpieza, aspiradora grande, comepolvo",
        "aspirobot, Dreame, limpiasuelos, mopa robot, aspiradora de Inés, Neato",
    ),
    "lawn_mower": (
        "Husqvarna, robot cortacésped, Automower, Gardena, Worx, Landroid, cortahierba, robot del césped, Shaun, "
        "cortacésped de Guille, erizo, robot verde",
        "Robomow, segadora, podadora, Mammotion, cortacésped de Gus, robot del prado",
    ),
    "message": (
        "la cena está lista, ha llegado el taxi, nos vamos ya, es hora de dormir, hay alguien en la puerta, "
        "la película empieza pronto, bajad por favor, está nevando, ha llegado la abuela, necesito ayuda, "
        "no olvidéis las llaves, lavaos las manos, feliz cumpleaños Emma, ha llegado la pizza",
        "la comida está servida, ha venido el fontanero, preparaos para el colegio, el bebé duerme, "
        "está lloviendo fuera, recoged los juguetes",
    ),
    "search_query": (
        "jazz, Taylor Swift, Abbey Road, música clásica, Bohemian Rhapsody, Rosalía, Joaquín Sabina, Mecano, "
        "Miles Davis, Harry Potter, ruido blanco, Camarón, La casa de papel, Shakira",
        "Pink Floyd, Purple Rain, Mozart, Julio Iglesias, sonido de olas, Héroes del Silencio",
    ),
    "zone": (
        "casa, oficina central, escuela, gimnasio, entrenamiento de fútbol, iglesia, universidad, "
        "casa de la abuela, hospital, aeropuerto, estación, casa de verano",
        "facultad, playa, clase de música, piso de Tino, supermercado, clínica",
    ),
    "timer_name": (
        "pizza, pasta, té, huevos, colada, pan, galletas, patatas asadas, siesta, arroz, pollo, clase de piano, "
        "tiempo de pantalla, tarta de Catalina",
        "lasaña, asado, cabezada, magdalenas, sopa, baño de Óliver",
    ),
    "timer_command": (
        "apaga la luz, abre el garaje, enciende la tele, cierra las cortinas, cierra la puerta principal, "
        "pon el lavavajillas, pon música, apaga la calefacción, riega las plantas, para la música, apaga todo, "
        "baja el volumen",
        "apaga el horno, sube las persianas, pon el riego, atenúa la luz, cierra las ventanas, pon la lavadora",
    ),
    "shopping_list_item": (
        "leche, huevos, pan, mantequilla, plátanos, aceite de oliva, papel higiénico, zumo de naranja, "
        "café molido, jabón de platos, pilas, tomates, arroz, dos aguacates, cereales de Ben, agua con gas",
        "leche de avena, yogures, sirope de arce, tres limones, champú de Clara, espinacas, arena para gatos",
    ),
    "todo_list_item": (
        "llamar al dentista, pagar el alquiler, recoger la tintorería, protector solar, reservar vuelos, "
        "renovar el pasaporte, arreglar la bici, velas, envolver regalos, cortar el césped, medicinas de Jaime, "
        "cambiar las sábanas, tornillos, comprar sellos",
        "hacer la declaración, botas de montaña, devolver los libros, saco de dormir, limpiar los canalones, "
        "regalo de Sofía",
    ),
}

_ITALIAN: Kinds = {
    "area": (
        "cucina, camera da letto, soggiorno, bagno, garage, ufficio, corridoio, sala da pranzo, lavanderia, "
        "soffitta, camera degli ospiti, camera matrimoniale, terrazza, balcone, giardino, stanza di Anna, "
        "sala giochi, biblioteca, officina, portico",
        "dispensa, ingresso, camera di Luigi, ripostiglio, cabina armadio, serra, veranda, studio",
    ),
    "floor": (
        "piano terra, primo piano, secondo piano, seminterrato, piano di sopra, piano di sotto, ammezzato, "
        "mansarda, piano principale, piano basso, cantina, piano dei bambini",
        "terzo piano, quarto piano, attico, piano superiore, piano dei genitori, sottotetto",
    ),
    "light": (
        "lampadario, acquario, albero di Natale, scrivania di Anna, specchio, striscia LED, libreria, "
        "sospensione, ghirlanda, comodino, applique, plafoniera, pianoforte, lanterna",
        "proiettore di stelle, vetrina, razzo di Giulio, credenza, faretto, globo lunare",
    ),
    "switch": (
        "macchina del caffè, bollitore, lavastoviglie, lavatrice, asciugatrice, tostapane, ferro da stiro, "
        "stampante, computer di Tommaso, pompa della piscina, coperta elettrica, deumidificatore, fontana, "
        "caricabatterie",
        "macchina espresso, cuociriso, macchina da cucire, console di Mia, pompa del laghetto, scaldasalviette",
    ),
    "input_boolean": (
        "modalità ospiti, modalità vacanza, modalità notte, modalità assenza, modalità festa, ore di silenzio, "
        "modalità eco, modalità bebè, modalità lavoro di Elena, modalità inverno, modalità sicurezza, "
        "non disturbare",
        "modalità visite, modalità viaggio, modalità sonno, modalità estate, modalità studio di Carlo, "
        "modalità silenziosa",
    ),
    "fan": (
        "ventilatore a soffitto, ventilatore a torre, ventilatore da tavolo, aspiratore, Dyson, cappa, "
        "purificatore d'aria, ventilatore di Giacomo, ventola, turbina, aeratore, ricambio d'aria",
        "ventilatore a piantana, circolatore d'aria, cappa aspirante, ventilatore di Elsa, soffiante, "
        "ventilatore oscillante",
    ),
    "media_player": (
        "tele, Sonos, Apple TV, soundbar, giradischi, Chromecast, Xbox, cassa di Samuele, stereo, Echo Dot, "
        "proiettore, radio, schermo grande, home cinema",
        "Google Home, PlayStation, tablet di Lucia, radiosveglia, cassa Bose, televisore",
    ),
    "climate": (
        "termostato, pompa di calore, condizionatore, termosifone, riscaldamento a pavimento, "
        "riscaldamento centrale, Netatmo, termosifone di Leo, stufa, termoconvettore, climatizzatore, caldaia",
        "Tado, termoventilatore, split, termosifone di Nina, riscaldamento a gas, pannello radiante",
    ),
    "cover": (
        "Velux, tenda a rullo, tenda oscurante, cancello principale, vela ombreggiante, schermo di proiezione, "
        "lucernario, tenda di Zoe, pergola, porta a soffietto, zanzariera, telo della piscina",
        "porta scorrevole, veneziana, pensilina, tenda di Massimo, gattaiola, tendina",
    ),
    "valve": (
        "rubinetto generale, irrigatore, tubo da giardino, valvola del gas, irrigazione a goccia, "
        "valvola principale, carico del laghetto, valvola dell'acqua calda, rubinetto di arresto, "
        "irrigatore di Rosa, serbatoio di pioggia, valvola del termosifone",
        "irrigazione del prato, valvola a sfera, idrante, tubo di Ugo, valvola miscelatrice, cisterna",
    ),
    "lock": (
        "porta d'ingresso, porta sul retro, porta laterale, cancelletto, cassaforte, porta della cantina, Nuki, "
        "armadietto dei medicinali, deposito bici, cassetta della posta, armadietto di Michele, serratura smart",
        "porta principale, cassetta degli attrezzi, lucchetto, cantinetta, cassetto di Eva, ingresso di servizio",
    ),
    "binary_sensor": (
        "sensore di movimento, sensore della finestra, sensore della porta, rilevatore di fumo, "
        "rilevatore di presenza, rilevatore di perdite, sensore del frigo, sensore di vibrazione, "
        "sensore della culla di Luna, sensore dello zerbino, rilevatore di rottura, sensore della posta",
        "rilevatore di movimento, rilevatore di allagamento, sensore del congelatore, sensore del cancello, "
        "sensore della sedia di Teo, sensore radar",
    ),
    "sensor": (
        "umidità, consumo elettrico, qualità dell'aria, produzione solare, consumo d'acqua, pluviometro, "
        "velocità del vento, contatore di energia, pianta di Irene, barometro, livello della batteria, "
        "livello di rumore",
        "consumo di gas, punto di rugiada, livello del gasolio, contapassi di Fabio, pressione dell'acqua, "
        "livello di polline",
    ),
    "person": (
        "Anna, Benedetto, Maria, Mamma, Papà, Nonna, zio Giuseppe, Giacomo, Sofia, Paolo, zia Carla, Yusuf, "
        "Gian Luca, Elena",
        "Carlotta, Nonno, zia Rita, Marco, Fatima, zio Enrico",
    ),
    "scene": (
        "serata cinema, cena, buongiorno, buonanotte, serata romantica, concentrazione, relax, alba, festa, "
        "lettura, compleanno di Amelia, serata giochi",
        "serata film, tramonto, brunch, fine giornata, festa di Giulio, spiaggia tropicale",
    ),
    "script": (
        "routine della notte, routine del mattino, uscita di casa, annaffia le piante, dai da mangiare al gatto, "
        "inserisci l'allarme, rientro a casa, benvenuto, chiudi tutto, lista del lunedì, chiamata sveglia, "
        "compiti di Nora",
        "routine della sera, promemoria bucato, chiusura vacanze, prepara temporale, sveglia di Pietro, ronda notturna",
    ),
    "button": (
        "campanello, riavvio, ripristino, identifica, riavvia modem, panico, avvia doccia, eroga crocchette, "
        "apri bagagliaio, chiama ascensore, gong, cercapersone di Sara",
        "autotest, posticipa, sveglia computer, citofono, calibra, dispenser di Otto",
    ),
    "todo": (
        "alimentari, valigia, faccende, regali, fine settimana, ferramenta, lavoro, desideri di Emilia, compiti, "
        "campeggio, Natale, farmacia",
        "commissioni, viaggio, pulizie, compleanno, impegni di Davide, trasloco",
    ),
    "weather": (
        "Roma, Milano, Napoli, Torino, Firenze, Palermo, New York, Berlino, Reggio Emilia, Bologna, Lugano, Bari",
        "Venezia, Genova, Buenos Aires, Verona, Trieste, Los Angeles",
    ),
    "vacuum": (
        "Roomba, robot aspirapolvere, aspirapolvere, Roborock, robot lavapavimenti, Robi, spazzatrice, Deebot, "
        "aspirapolvere di Oscar, robot delle pulizie, aspirapolvere grande, mangiapolvere",
        "aspirobot, Dreame, lavapavimenti, scopa robot, aspirapolvere di Ines, Neato",
    ),
    "lawn_mower": (
        "Husqvarna, robot tagliaerba, Automower, Gardena, Worx, Landroid, tosaerba, robot del prato, Shaun, "
        "tagliaerba di Guido, riccio, robot verde",
        "Robomow, falciatrice, rasaerba, Mammotion, tagliaerba di Gustavo, robot da giardino",
    ),
    "message": (
        "la cena è pronta, è arrivato il taxi, stiamo uscendo, è ora di dormire, c'è qualcuno alla porta, "
        "il film inizia tra poco, scendete per favore, sta nevicando, è arrivata la nonna, ho bisogno di aiuto, "
        "non dimenticate le chiavi, lavatevi le mani, buon compleanno Emma, è arrivata la pizza",
        "il pranzo è servito, è venuto l'idraulico, preparatevi per la scuola, il bambino dorme, fuori piove, "
        "mettete a posto i giochi",
    ),
    "search_query": (
        "jazz, Taylor Swift, Abbey Road, musica classica, Bohemian Rhapsody, Måneskin, Lucio Battisti, "
        "Vasco Rossi, Miles Davis, Harry Potter, rumore bianco, Fabrizio De André, La vita è bella, Laura Pausini",
        "Pink Floyd, Purple Rain, Mozart, Zucchero, suono delle onde, Eros Ramazzotti",
    ),
    "zone": (
        "casa, posto di lavoro, scuola, palestra, allenamento di calcio, chiesa, università, casa della nonna, "
        "ospedale, aeroporto, stazione, casa al mare",
        "facoltà, spiaggia, lezione di musica, appartamento di Tino, supermercato, clinica",
    ),
    "timer_name": (
        "pizza, pasta, tè, uova, bucato, pane, biscotti, patate al forno, pisolino, riso, pollo, "
        "lezione di piano, tempo schermo, torta di Caterina",
        "lasagne, arrosto, riposino, muffin, zuppa, bagnetto di Olivia",
    ),
    "timer_command": (
        "spegni la luce, apri il garage, accendi la tele, chiudi le tende, chiudi a chiave la porta, "
        "avvia la lavastoviglie, metti un po' di musica, spegni il riscaldamento, annaffia le piante di casa, "
        "ferma la musica, spegni tutto, abbassa il volume",
        "spegni il forno, alza le tapparelle, avvia l'irrigazione, abbassa la luce, chiudi le finestre, "
        "avvia la lavatrice",
    ),
    "shopping_list_item": (
        "latte, uova, pane, burro, banane, olio d'oliva, carta igienica, succo d'arancia, caffè macinato, "
        "detersivo per piatti, pile, pomodori, riso, due avocado, cereali di Ben, acqua frizzante",
        "latte d'avena, yogurt, sciroppo d'acero, tre limoni, shampoo di Clara, spinaci, lettiera per gatti",
    ),
    "todo_list_item": (
        "chiamare il dentista, pagare l'affitto, ritirare la lavanderia, crema solare, prenotare i voli, "
        "rinnovare il passaporto, aggiustare la bici, candele, incartare i regali, tagliare l'erba, "
        "medicine di Giacomo, cambiare le lenzuola, viti, comprare francobolli",
        "fare la dichiarazione, scarponi, restituire i libri, sacco a pelo, pulire le grondaie, regalo di Sofia",
    ),
}

_DUTCH: Kinds = {
    "area": (
        "keuken, slaapkamer, woonkamer, badkamer, garage, kantoor, gang, eetkamer, wasruimte, logeerkamer, "
        "kinderkamer, studeerkamer, terras, balkon, tuin, Anna's kamer, papa's kantoor, hobbykamer, serre, "
        "speelkamer",
        "bijkeuken, hal, werkplaats, gastentoilet, veranda, berging, Lisa's kamer, bibliotheek",
    ),
    "floor": (
        "begane grond, eerste verdieping, tweede verdieping, kelder, boven, beneden, tussenverdieping, zolder, "
        "hoofdverdieping, souterrain, bovenverdieping, kinderverdieping",
        "derde verdieping, vierde verdieping, benedenverdieping, vliering, ouderverdieping, dakverdieping",
    ),
    "light": (
        "kroonluchter, aquarium, kerstboom, Anna's bureau, spiegel, ledstrip, boekenkast, hanger, slinger, "
        "nachtkastje, wandarmatuur, plafonnière, piano, lantaarn",
        "sterrenprojector, vitrine, Jelles raket, dressoir, uplighter, maanbol",
    ),
    "switch": (
        "koffiezetapparaat, waterkoker, vaatwasser, wasmachine, droger, broodrooster, strijkijzer, printer, "
        "Toms computer, zwembadpomp, elektrische deken, luchtontvochtiger, fontein, oplader",
        "espressomachine, rijstkoker, naaimachine, Mia's spelcomputer, vijverpomp, handdoekwarmer",
    ),
    "input_boolean": (
        "gastmodus, vakantiemodus, nachtmodus, afwezigheid, feestmodus, stille uren, spaarmodus, babymodus, "
        "Lena's werkmodus, wintermodus, alarmmodus, niet storen",
        "bezoekmodus, reismodus, slaapmodus, zomermodus, Karels studiemodus, stiltemodus",
    ),
    "fan": (
        "plafondventilator, torenventilator, tafelventilator, afzuiging, Dyson, afzuigkap, luchtreiniger, "
        "Jaaps ventilator, badkamerventilator, ventilatie, turbine, raamventilator",
        "staande ventilator, luchtcirculator, wasemkap, Ella's ventilator, muurventilator, blazer",
    ),
    "media_player": (
        "tv, Sonos, Apple TV, soundbar, platenspeler, Chromecast, Xbox, Sams speaker, stereo, Echo Dot, beamer, "
        "radio, groot scherm, thuisbioscoop",
        "Google Home, PlayStation, Lucy's tablet, wekkerradio, Bose speaker, televisie",
    ),
    "climate": (
        "thermostaat, warmtepomp, airco, radiator, vloerverwarming, centrale verwarming, Toon, Leo's radiator, "
        "kachel, convector, mobiele airco, cv-ketel",
        "Tado, straalkachel, splitunit, Nina's radiator, gashaard, infraroodpaneel",
    ),
    "cover": (
        "Velux, rolluik links, verduistering, hoofdpoort, zonnezeil, projectiescherm, dakraam, Zoë's gordijn, "
        "pergola, vouwdeur, hordeur, zwembadafdekking",
        "schuifdeur, lamellen, luifel, Max' rolgordijn, kattenluik, vitrage",
    ),
    "valve": (
        "hoofdkraan, sproeier, tuinslang, gasklep, druppelslang, hoofdklep, vijvervulling, warmwaterkraan, "
        "afsluiter, Rosa's sproeier, regenton, radiatorkraan",
        "gazonsproeier, kogelkraan, hydrant, Hugo's slang, mengkraan, waterput",
    ),
    "lock": (
        "voordeur, achterdeur, zijdeur, tuinpoort, kluis, kelderdeur, Nuki, medicijnkast, fietsenhok, "
        "brievenbus, Mikes kluisje, slim slot",
        "hoofdingang, gereedschapskist, hangslot, wijnkast, Eva's lade, dienstingang",
    ),
    "binary_sensor": (
        "bewegingssensor, raamsensor, deursensor, rookmelder, aanwezigheidssensor, lekkagesensor, "
        "koelkastsensor, trillingssensor, Luna's bedsensor, deurmatsensor, glasbreukmelder, brievenbussensor",
        "bewegingsmelder, watermelder, vriezersensor, poortsensor, Theo's stoelsensor, radarsensor",
    ),
    "sensor": (
        "luchtvochtigheid, stroomverbruik, luchtkwaliteit, zonneopbrengst, waterverbruik, regenmeter, "
        "windsnelheid, energiemeter, Ivy's plant, barometer, batterijniveau, geluidsniveau",
        "gasverbruik, dauwpunt, oliepeil, Finns stappenteller, waterdruk, pollenstand",
    ),
    "person": (
        "Anna, Ben, Maria, Mama, Papa, Oma, oom Jan, Jaap, Sofie, Paul, tante Karin, Yusuf, Anne-Marie, Femke",
        "Charlotte, Opa, tante Rita, Marcus, Fatima, oom Henk",
    ),
    "scene": (
        "filmavond, diner, goedemorgen, welterusten, romantische avond, concentratie, ontspanning, zonsopgang, "
        "feest, leestijd, Amy's verjaardag, spelletjesavond",
        "bioscoopavond, zonsondergang, brunch, einde dag, Jelles feestje, tropisch strand",
    ),
    "script": (
        "nachtroutine, ochtendroutine, vertrek van huis, planten water geven, kat voeren, alarm aanzetten, "
        "thuiskomst, welkomstgroet, alles afsluiten, maandaglijst, wekdienst, Nora's huiswerk",
        "avondroutine, washerinnering, vakantiesluiting, stormvoorbereiding, Peters wekker, nachtwacht",
    ),
    "button": (
        "deurbel, herstart, reset, identificeren, modem herstarten, paniek, douche starten, voer geven, "
        "kofferbak openen, lift roepen, gong, Sara's pieper",
        "zelftest, snooze, computer wekken, intercom, kalibreren, Otto's voerbak",
    ),
    "todo": (
        "inkopen, vakantie, huishouden, cadeaus, weekend, bouwmarkt, werk, Emily's wensen, huiswerk, kamperen, "
        "kerst, apotheek",
        "klusjes, reis, schoonmaak, verjaardag, Davids taken, verhuizing",
    ),
    "weather": (
        "Amsterdam, Rotterdam, Utrecht, Brussel, Antwerpen, Gent, New York, Berlijn, Den Haag, Groningen, "
        "Maastricht, Leiden",
        "Eindhoven, Zwolle, Buenos Aires, Haarlem, Brugge, Los Angeles",
    ),
    "vacuum": (
        "Roomba, robotstofzuiger, stofzuiger, Roborock, dweilrobot, Robbie, veegmachine, Deebot, "
        "Oscars stofzuiger, schoonmaakrobot, grote stofzuiger, stofvreter",
        "zuigrobot, Dreame, vloerreiniger, kruimeldief, Hanna's stofzuiger, Neato",
    ),
    "lawn_mower": (
        "Husqvarna, robotmaaier, Automower, Gardena, Worx, Landroid, grassnijder, gazonrobot, Shaun, "
        "Bills maaier, egel, groene robot",
        "Robomow, grasvreter, grasmaaier, Mammotion, Guus' maaier, weiderobot",
    ),
    "message": (
        "het eten is klaar, de taxi is er, we vertrekken nu, het is bedtijd, er staat iemand voor de deur, "
        "de film begint zo, kom naar beneden, het sneeuwt, oma is er, ik heb hulp nodig, "
        "vergeet je sleutels niet, was je handen, gefeliciteerd Emma, de pizza is bezorgd",
        "de lunch staat klaar, de loodgieter is er, maak je klaar voor school, de baby slaapt, "
        "het regent buiten, ruim je speelgoed op",
    ),
    "search_query": (
        "jazz, Taylor Swift, Abbey Road, klassieke muziek, Bohemian Rhapsody, André Hazes, Marco Borsato, "
        "Golden Earring, Miles Davis, Harry Potter, witte ruis, Doe Maar, Jiskefet, Krezip",
        "Pink Floyd, Purple Rain, Mozart, Boudewijn de Groot, oceaangeluiden, De Dijk",
    ),
    "zone": (
        "thuis, kantoorpand, school, sportschool, voetbaltraining, kerk, universiteit, oma's huis, ziekenhuis, "
        "luchthaven, station, vakantiehuis",
        "hogeschool, strand, muziekles, Tims huis, supermarkt, kliniek",
    ),
    "timer_name": (
        "pizza, pasta, thee, eieren, was, brood, koekjes, ovenaardappels, dutje, rijst, kip, pianoles, "
        "schermtijd, Katjes taart",
        "lasagne, braadstuk, powernap, muffins, soep, Olivers bad",
    ),
    "timer_command": (
        "doe het licht uit, open de garage, zet de tv aan, sluit de gordijnen, doe de voordeur op slot, "
        "start de vaatwasser, speel muziek, zet de verwarming uit, geef de planten water, stop de muziek, "
        "zet alles uit, zet het volume lager",
        "zet de oven uit, doe de rolluiken omhoog, zet de sproeiers aan, dim het licht, sluit de ramen, "
        "start de wasmachine",
    ),
    "shopping_list_item": (
        "melk, eieren, brood, boter, bananen, olijfolie, wc-papier, sinaasappelsap, gemalen koffie, afwasmiddel, "
        "batterijen, tomaten, rijst, twee avocado's, Bens muesli, bruisend water",
        "havermelk, yoghurt, ahornsiroop, drie citroenen, Clara's shampoo, spinazie, kattenbakvulling",
    ),
    "todo_list_item": (
        "tandarts bellen, huur betalen, stomerij ophalen, zonnebrand, vluchten boeken, paspoort verlengen, "
        "fiets repareren, kaarsen, cadeaus inpakken, gras maaien, Jims medicijnen, bed verschonen, schroeven, "
        "postzegels kopen",
        "belastingaangifte doen, wandelschoenen, boeken terugbrengen, slaapzak, dakgoot schoonmaken, Sofies cadeau",
    ),
}

_CHINESE: Kinds = {
    "area": (
        "厨房, 卧室, 客厅, 浴室, 车库, 办公室, 走廊, 餐厅, 洗衣房, 主卧, 次卧, 儿童房, 阳台, 花园, 小明的房间, "
        "爸爸的书房, 游戏室, 影音室, 玄关, 衣帽间",
        "储藏室, 茶室, 书房, 健身房, 露台, 客房, 丽丽的房间, 琴房",
    ),
    "floor": (
        "一楼, 二楼, 三楼, 四楼, 负一楼, 地下室, 阁楼, 楼上, 楼下, 顶层, 夹层, 底层",
        "五楼, 六楼, 负二楼, 七楼, 半地下室, 中间层",
    ),
    "light": (
        "水晶吊灯, 圣诞树, 小红的书桌灯, 镜前灯, 灯带, 书架灯, 落地灯, 氛围灯, 壁灯, 床头小灯, 鱼缸灯, 星空灯, "
        "月球灯, 橱柜灯",
        "投影星灯, 展示柜灯, 小刚的火箭灯, 盐灯, 餐边柜灯, 云朵灯",
    ),
    "switch": (
        "咖啡机, 电热水壶, 洗碗机, 洗衣机, 烘干机, 烤面包机, 电熨斗, 打印机, 小王的电脑, 水泵, 电热毯, 除湿机, "
        "喷泉, 充电器",
        "电饭煲, 缝纫机, 小美的游戏机, 鱼缸泵, 毛巾架, 加湿器",
    ),
    "input_boolean": (
        "访客状态, 度假状态, 夜间状态, 外出状态, 聚会状态, 免打扰, 节能状态, 宝宝睡眠, 妈妈的工作状态, 冬季状态, "
        "布防状态, 安静时段",
        "来客状态, 旅行状态, 睡眠状态, 夏季状态, 小刚的学习状态, 静默状态",
    ),
    "fan": (
        "塔扇, 台扇, 排气扇, 戴森, 抽油烟机, 空气净化器, 小强的电扇, 换气扇, 循环扇, 落地扇, 新风机, 窗式风扇",
        "立式风扇, 油烟机, 摇头扇, 小雨的电扇, 壁扇, 无叶风扇",
    ),
    "media_player": (
        "电视, 小爱音箱, 天猫精灵, 回音壁, 唱片机, 投影仪, 小李的音箱, 音响, 收音机, 大屏幕, 家庭影院, 智能屏",
        "小度音箱, 游戏主机, 露露的平板, 功放, 蓝牙音箱, 电视盒子",
    ),
    "climate": (
        "温控器, 热泵, 壁挂空调, 暖气片, 地暖, 中央空调, 小乐的空调, 取暖器, 立式空调, 壁炉, 暖风机, 变频空调",
        "锅炉, 油汀, 移动空调, 妮妮的暖气, 窗式空调, 暖气炉",
    ),
    "cover": (
        "遮光帘, 百叶帘, 卷帘, 大铁门, 遮阳篷, 投影幕, 天窗, 小佳的窗帘, 凉亭顶棚, 折叠门, 纱帘, 泳池盖",
        "推拉门, 罗马帘, 雨棚, 小军的卷帘, 猫门, 蜂巢帘",
    ),
    "valve": (
        "总水阀, 洒水器, 花园水管, 燃气阀, 滴灌, 主阀门, 鱼池补水, 热水阀, 截止阀, 奶奶的洒水器, 雨水桶, 暖气阀",
        "草坪喷灌, 球阀, 消防栓, 小东的水管, 混水阀, 蓄水池",
    ),
    "lock": (
        "前门, 后门, 侧门, 院门, 保险柜, 地下室门, 指纹锁, 药柜, 自行车棚, 信箱, 小马的储物柜, 智能锁",
        "入户门, 工具箱, 挂锁, 酒柜, 小雅的抽屉, 员工入口",
    ),
    "binary_sensor": (
        "人体传感器, 窗磁传感器, 门磁传感器, 烟雾传感器, 存在传感器, 漏水传感器, 冰箱门磁, 震动传感器, "
        "宝宝床传感器, 地垫传感器, 玻璃破碎传感器, 信箱传感器",
        "移动传感器, 水浸传感器, 冷柜门磁, 院门传感器, 小天的座椅传感器, 毫米波雷达",
    ),
    "sensor": (
        "湿度计, 用电量, 空气质量, 太阳能发电, 用水量, 雨量计, 风速计, 电表, 妈妈的绿萝, 气压计, 电池电量, 噪音值",
        "燃气用量, 露点仪, 油箱液位, 小飞的计步器, 水压, 花粉浓度",
    ),
    "person": (
        "小明, 小红, 妈妈, 爸爸, 奶奶, 王叔叔, 李雷, 韩梅梅, 张伟, 刘阿姨, 欧阳娜娜, 陈静",
        "小刚, 爷爷, 赵阿姨, 周杰, 孙丽, 吴叔叔",
    ),
    "scene": (
        "观影, 晚餐, 早安, 晚安, 浪漫之夜, 专注, 放松, 日出, 派对, 阅读, 小美生日, 瑜伽",
        "约会, 日落, 电影之夜, 下午茶, 冥想, 海滩",
    ),
    "script": (
        "睡前流程, 起床流程, 离家流程, 浇花, 喂猫, 启动警戒, 回家流程, 欢迎回家, 全屋上锁, 周一清单, 叫醒服务, "
        "小诺的作业提醒",
        "晚间流程, 洗衣提醒, 度假关闭, 防台风准备, 小鹏的闹钟, 夜间巡查",
    ),
    "button": (
        "门铃, 重启, 复位, 识别, 重启路由, 求救, 启动淋浴, 投喂, 打开后备箱, 呼叫电梯, 报时, 护士呼叫",
        "自检, 贪睡, 唤醒电脑, 对讲, 校准, 旺财喂食",
    ),
    "todo": (
        "买菜清单, 行李清单, 家务清单, 礼物清单, 周末计划, 五金清单, 工作清单, 小艾的愿望单, 作业清单, 露营清单, "
        "年货清单, 药品清单",
        "跑腿清单, 旅行清单, 打扫清单, 生日清单, 大卫的待办, 搬家清单",
    ),
    "weather": (
        "北京, 上海, 广州, 深圳, 成都, 杭州, 纽约, 柏林, 石家庄, 西安, 武汉, 哈尔滨",
        "南京, 重庆, 乌鲁木齐, 厦门, 青岛, 洛杉矶",
    ),
    "vacuum": (
        "扫地机器人, 吸尘器, 石头扫地机, 扫拖一体机, 小白, 追觅, 清洁机器人, 科沃斯, 爸爸的吸尘器, 拖地机器人, "
        "大吸尘器, 米家扫地机",
        "云鲸, 洗地机, 扫地小助手, 灰尘怪, 奶奶的扫地机, 擦地机",
    ),
    "lawn_mower": (
        "割草机器人, 草坪机器人, 小绿, 富世华, 除草小车, 剪草机, 嘉丁拿, 爷爷的割草车, 刺猬号, 绿色机器人, "
        "威克士, 草地管家",
        "剪草机器人, 吃草怪, 修草机, 草坪小车, 大叔的割草车, 库犸",
    ),
    "message": (
        "晚饭好了, 出租车到了, 我们要出发了, 该睡觉了, 有人在门口, 电影马上开始, 请下楼, 外面下雪了, 奶奶到了, "
        "我需要帮忙, 别忘了带钥匙, 快去洗手, 祝小明生日快乐, 披萨到了",
        "午饭准备好了, 水管工来了, 准备去上学, 宝宝睡着了, 外面下雨了, 把玩具收好",
    ),
    "search_query": (
        "周杰伦, 爵士乐, 稻香, 古典音乐, 青花瓷, 邓丽君, 五月天, 白噪音, 西游记, 王菲, 月亮代表我的心, 郭德纲相声",
        "陈奕迅, 莫扎特, 海浪声, 林俊杰, 三国演义, 钢琴曲",
    ),
    "zone": (
        "家, 公司, 学校, 体育馆, 足球训练, 教堂, 大学, 奶奶家, 医院, 机场, 火车站, 度假屋",
        "学院, 海边, 音乐课, 小田家, 超市, 诊所",
    ),
    "timer_name": (
        "披萨, 面条, 泡茶, 鸡蛋, 洗衣服, 面包, 饼干, 烤土豆, 午睡, 米饭, 鸡肉, 练琴, 屏幕时间, 小凯的蛋糕",
        "饺子, 红烧肉, 小憩, 蛋挞, 煲汤, 宝宝洗澡",
    ),
    "timer_command": (
        "关灯, 打开车库门, 打开电视, 拉上窗帘, 锁上前门, 启动洗碗机, 播放音乐, 关掉暖气, 给植物浇水, 停止音乐, "
        "全部关掉, 调低音量",
        "关掉烤箱, 升起百叶窗, 打开洒水器, 把灯调暗, 关上窗户, 启动洗衣机",
    ),
    "shopping_list_item": (
        "牛奶, 鸡蛋, 面包, 黄油, 香蕉, 橄榄油, 卫生纸, 橙汁, 咖啡粉, 洗洁精, 电池, 西红柿, 大米, 两个牛油果, "
        "小本的麦片, 气泡水",
        "燕麦奶, 酸奶, 枫糖浆, 三个柠檬, 小雪的洗发水, 菠菜, 猫砂",
    ),
    "todo_list_item": (
        "给牙医打电话, 交房租, 取干洗衣服, 防晒霜, 订机票, 换护照, 修自行车, 蜡烛, 包礼物, 割草, 小吉的药, "
        "换床单, 螺丝, 买邮票",
        "报税, 登山鞋, 还书, 睡袋, 清理排水沟, 小菲的礼物",
    ),
}

# Languages of the package that are not here use the English names.
WORDS: dict[str, Kinds] = {
    "en": _ENGLISH,
    "de": _GERMAN,
    "fr": _FRENCH,
    "es": _SPANISH,
    "it": _ITALIAN,
    "nl": _DUTCH,
    "zh-CN": _CHINESE,
}


def names(language: str, *, held_out: bool) -> dict[str, list[str]]:
    """Return the names of each kind for `language` (a key of WORDS), either the training or the held-out ones."""
    return {kind: pair[held_out].split(", ") for kind, pair in WORDS[language].items()}
